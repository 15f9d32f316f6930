"""Many small tensors as one, with the place of each: a file of one tensor opens as one map instead of hundreds of reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import AdapterUnsupported
from loraweave.hub.stores import ternary
from loraweave.lowrank.algebra import on_host
from loraweave.types import Factors

PACKED = "packed"

# more than any factor or head has; a product over a long list of large sizes is slow
_MAX_AXES = 8

Places = list[tuple[str, int, list[int]]]


def pack(tensors: Mapping[str, Tensor]) -> tuple[Places, Tensor]:
    """Return (the place [name, offset, shape] of each tensor, one fp32 vector of all in that order), as copies."""
    places: Places = []
    offset = 0
    for name, tensor in tensors.items():
        places.append((name, offset, list(tensor.shape)))
        offset += tensor.numel()
    rows = [on_host(tensor).reshape(-1) for tensor in tensors.values()]
    return places, torch.cat(rows) if rows else torch.empty(0)


def unpack(places: Any, flat: Tensor) -> dict[str, Tensor]:
    """Return the tensors that `pack` packed, by name, as views of `flat`.

    The places come from a file, so all are checked before one is used: whole numbers, none negative, each tensor beginning
    where the one before ends, the last ending where `flat` does, no name twice. Raises ValueError.
    """
    if flat.dtype != torch.float32 or flat.dim() != 1:
        raise ValueError(f"its packed tensor is {flat.dtype} of shape {tuple(flat.shape)}, not a vector of fp32")
    if not isinstance(places, list):
        raise ValueError(f"its table of places is {type(places).__name__}, not a list")
    end, sizes = 0, []
    for place in places:
        name, offset, shape = _check_place(place)
        if offset != end:
            raise ValueError(f"tensor {name!r:.60} begins at {offset}, but the one before it ends at {end}")
        sizes.append(math.prod(shape))
        end += sizes[-1]
        if end > flat.shape[0]:
            raise ValueError(f"tensor {name!r:.60} ends at {end}, but the packed tensor has {flat.shape[0]} entries")
    if end != flat.shape[0]:
        raise ValueError(f"its tensors end at {end}, but the packed tensor has {flat.shape[0]} entries")
    # one call for all: a slice of its own for each costs twice as much
    parts = torch.split_with_sizes(flat, sizes) if sizes else ()
    tensors = {name: part.view(shape) for (name, _, shape), part in zip(places, parts, strict=True)}
    if len(tensors) != len(places):
        raise ValueError("its table of places has a name twice")
    return tensors


def _check_place(place: Any) -> tuple[str, int, list[int]]:
    match place:
        case [str() as name, offset, list() as shape] if len(shape) <= _MAX_AXES:
            # a loop: any() over a generator takes three times as long, and there are hundreds of places in a blob
            for number in (offset, *shape):
                if type(number) is not int or not 0 <= number < 2**62:
                    raise ValueError(
                        f"the place of tensor {name!r:.60} is {place[1:]!r:.60}; an offset or size is not from 0 to 2^62"
                    )
            return name, offset, shape
    raise ValueError(f"a place is {place!r:.60}, not [name, offset, shape] with at most {_MAX_AXES} axes")


STORED_AS = ("factors", "compeft")
FACTORS = ("a_RI", "b_OR")
KINDS = ("linear", "embedding", "conv", "expert")


def take_apart(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor], *, stored_as: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (description, tensors by name): one packed fp32 tensor. `stored_as` is one of `STORED_AS`.

    "compeft" packs the factors of all layers as one ternary stream with its scales beside it. Raises AdapterUnsupported if
    factors are not ternary, and for another `stored_as`.
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
    description["places"], flat = pack(tensors)
    return description, {PACKED: flat, **streams}


def put_together(
    description: Mapping[str, Any], names: Collection[str], tensor: Callable[[str], Tensor]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Return (layers, heads), bit for bit as `take_apart` got them; `tensor` returns the tensor of each name in `names`.

    Raises KeyError, TypeError or ValueError for a damaged description, AdapterCorrupt for a damaged stream.
    """
    if "places" in description:
        # blobs up to version 2 have no table of places: each of their tensors has an entry of its own in the file
        tensors = unpack(description["places"], tensor(PACKED))
        tensors |= {name: tensor(name) for name in names if name != PACKED}
        names, tensor = tensors, tensors.__getitem__
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
    unpacked = iter(_unpack(entries, tensor) if stored_as == "compeft" else [])
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


def _unpack(entries: Any, tensor: Callable[[str], Tensor]) -> list[Tensor]:
    shapes = []
    for entry in entries:
        sizes = entry["shape"]
        if len(sizes) != 3 or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            raise ValueError(f"layer {entry['path']!r} has the shape {sizes!r:.60}, not (O, R, I)")
        num_out, rank, num_in = sizes
        shapes += [(rank, num_in), (num_out, rank)]
    return ternary.unpack({name: tensor(name) for name in ("signs", "scales")}, shapes)
