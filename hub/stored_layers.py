"""Layers and heads as named tensors and a description in JSON, as they are or with ternary factors in few bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from loraweave.errors import AdapterUnsupported
from loraweave.hub import packing, ternary
from loraweave.types import Factors

STORED_AS = ("factors", "compeft")
FACTORS = ("a_RI", "b_OR")
KINDS = ("linear", "embedding", "conv")


def take_apart(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor], *, stored_as: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, tensors by name): one packed fp32 tensor. `stored_as` is one of `STORED_AS`.

    "compeft" keeps the factors of all layers as one ternary stream and its scales beside it. Raises AdapterUnsupported
    where factors are not ternary, and for another `stored_as`.
    """
    if stored_as not in STORED_AS:
        raise AdapterUnsupported(f"an adapter is stored as {' or '.join(map(repr, STORED_AS))}, not as {stored_as!r}")
    entries, tensors, packed = [], {}, []
    for number, (layer, factors) in enumerate(sorted(layers.items())):
        parts = factors.tensors()
        entry: dict[str, Any] = {"path": layer, "kind": factors.kind, "kernel": list(factors.kernel)}
        if stored_as == "compeft":
            pair = [parts.pop(part) for part in FACTORS]
            packed += [(f"{part} of layer {layer!r}", tensor) for part, tensor in zip(FACTORS, pair, strict=True)]
            entry["shape"] = [pair[1].shape[0], *pair[0].shape]
        entries.append({**entry, "parts": list(parts)})
        # numbered, since a module path may hold any character
        tensors.update({f"{number}.{part}": tensor for part, tensor in parts.items()})
    description: dict[str, Any] = {"layers": entries}
    streams: dict[str, Tensor] = {}
    if stored_as != "factors":
        description["stored_as"] = stored_as
        streams = ternary.pack(packed)
    if heads:
        description["heads"] = sorted(heads)
    tensors |= {f"head.{number}": heads[name] for number, name in enumerate(sorted(heads))}
    description["places"], flat = packing.pack(tensors)
    return description, {packing.PACKED: flat, **streams}


def put_together(
    description: Mapping[str, Any], names: Collection[str], tensor: Callable[[str], Tensor]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """(layers, heads) of what `take_apart` gave, bit for bit; `tensor` gives those in `names`.

    Raises KeyError, TypeError or ValueError for a description that is damaged, AdapterCorrupt for a damaged stream.
    """
    if "places" in description:
        # blobs up to version 2 have no table of places: each of their tensors has an entry of its own in the file
        found = packing.unpack(description["places"], tensor(packing.PACKED))
        found |= {name: tensor(name) for name in names if name != packing.PACKED}
        names, tensor = found, found.__getitem__
    entries, heads = description["layers"], description.get("heads", [])
    stored_as = description.get("stored_as", "factors")
    if stored_as not in STORED_AS:
        raise ValueError(f"it is stored as {stored_as!r:.60}, which this version does not know")
    listed = {f"{number}.{part}" for number, entry in enumerate(entries) for part in entry["parts"]}
    listed |= {f"head.{number}" for number in range(len(heads))}
    if stored_as == "compeft":
        listed |= {"signs", "scales"}
    if listed != set(names):
        raise ValueError(f"it lists {len(listed)} tensors that are not the {len(names)} it has")
    unpacked = iter(_unpacked(entries, tensor) if stored_as == "compeft" else [])
    layers = {}
    for number, entry in enumerate(entries):
        parts: dict[str, Any] = {part: tensor(f"{number}.{part}") for part in entry["parts"]}
        if stored_as == "compeft":
            parts |= {part: next(unpacked) for part in FACTORS}
        if entry["kind"] not in KINDS:
            raise ValueError(f"layer {entry['path']!r} is of the unknown kind {entry['kind']!r:.60}")
        layers[entry["path"]] = Factors(kind=entry["kind"], kernel=tuple(entry["kernel"]), **parts)
    if len(layers) != len(entries) or len(set(heads)) != len(heads):
        raise ValueError("it lists a layer or a head twice")
    return layers, {name: tensor(f"head.{number}") for number, name in enumerate(heads)}


def _unpacked(entries: Any, tensor: Callable[[str], Tensor]) -> list[Tensor]:
    shapes = []
    for entry in entries:
        sizes = entry["shape"]
        if len(sizes) != 3 or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            raise ValueError(f"layer {entry['path']!r} has the shape {sizes!r:.60}, not (O, R, I)")
        num_out, rank, num_in = sizes
        shapes += [(rank, num_in), (num_out, rank)]
    return ternary.unpack({name: tensor(name) for name in ("signs", "scales")}, shapes)
