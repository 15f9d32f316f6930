"""Blobs: an adapter's content (factors, heads, invocation tokens) as one immutable safetensors file, named by its hash.

All fp32 numbers are one tensor, and the metadata lists the place of each part in it: opening a blob takes one map of the
file, not hundreds of reads. An entry of the registry `packings` may store factors in fewer bits. A blob appears by rename,
complete and on disk, and is never written again: processes have it mapped into memory. Its metadata also holds the
catalogue's row as of the writing, so that a hub whose catalogue is lost can be rebuilt.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import loraweave.registry as registry
from loraweave.common.files import file_digest
from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._files import KeptFile, KeptFiles
from loraweave.hub.stores.folder_blobs import LISTED, file_bytes, listed, reading_blob, without_files
from loraweave.hub.stores.protocols import BlobStore
from loraweave.hub.tables.rows import Row
from loraweave.lowrank.algebra import on_host
from loraweave.types import Factors

# 1: one tensor for each factor; 2: heads too, or factors stored as "compeft"; 3: one packed tensor; 4: invocation tokens
# too, without which it would be another adapter
FORMAT_VERSIONS = (1, 2, 3, 4)
_METADATA_KEY = "loraweave"

PACKED = "packed"
PAIR = ("a_RI", "b_OR")
KINDS = ("linear", "embedding", "conv", "expert")
# more than any factor or head has; a product over a long list of large sizes is slow
_MAX_AXES = 8

Places = list[tuple[str, int, list[int]]]


@dataclass(frozen=True)
class Blob:
    """The content of a blob: an adapter's content, and its row of the catalogue (`origin`) at the time of writing."""

    layers: Mapping[str, Factors]
    origin: Mapping[str, Any]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def content_hash(self) -> str:
        return content_hash(self.layers, self.heads, self.invocation)


def blob_bytes(
    layers: Mapping[str, Factors],
    origin: str,
    *,
    heads: Mapping[str, Tensor] = MappingProxyType({}),
    invocation: tuple[int, ...] = (),
    stored_as: str = "factors",
) -> bytes:
    """Return the bytes of an adapter's blob. `origin` is JSON; `stored_as` names a packing, or "factors".

    Raises AdapterUnsupported for factors that the packing cannot hold.
    """
    description, tensors = take_apart(layers, heads, stored_as=stored_as)
    if invocation:
        description["invocation"] = list(invocation)
    header = {"version": 4 if invocation else 3, **description, "origin": json.loads(origin)}
    data: bytes = save(tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
    return data


def read_blob(path: Path, who: str) -> Blob:
    """Return the content of the blob at `path`, its tensors mapped from the file.

    Raises AdapterCorrupt, naming `who` and the path, if the file is not an intact blob; FileNotFoundError if it is missing;
    OSError if the file system cannot open or map it.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_METADATA_KEY])
            if header["version"] not in FORMAT_VERSIONS:
                raise ValueError(f"its version is {header['version']}, not one of {FORMAT_VERSIONS}")
            layers, heads = put_together(header, file.keys(), file.get_tensor)
            invocation = tuple(header.get("invocation", ()))
            if not all(type(token) is int and token >= 0 for token in invocation):
                raise ValueError(f"its invocation is {invocation!r:.60}, not token ids")
            return Blob(layers, header["origin"], heads, invocation)
    except RuntimeError as error:
        # torch opens the file twice: one that was deleted in between is reported as missing, too
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        # torch's message for a file that cannot be opened or mapped: the content is not at fault
        if "file" in str(error):
            raise OSError(errno.EIO, f"{who}: blob {path} cannot be mapped ({error})") from error
        raise AdapterCorrupt(f"{who}: blob {path} cannot be read ({error})") from error
    # a damaged ternary stream is AdapterCorrupt, hence a ValueError, already, but does not know the file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterCorrupt(f"{who}: blob {path} cannot be read ({type(error).__name__}: {error})") from error


def stored_adapter(blobs: BlobStore, row: Row) -> Adapter:
    """Return the adapter of a row, its tensors mapped from the blob. Raises AdapterCorrupt for a damaged or missing blob."""
    record = row.record
    who = f"adapter {record.name!r}"
    with reading_blob(blobs, record.hash, who):
        blob = read_blob(blobs.local(record.hash, row.blob.file_sha256, who), who)
    card: Mapping[str, Any] = record.card
    files: Mapping[str, bytes] = {}
    if LISTED in card:
        table = {name: KeptFile(*entry, partial(file_bytes, blobs, entry[0], who)) for name, entry in listed(record).items()}
        card, files = without_files(card), KeptFiles(table)
    parts = record.base_model, blob.layers, record.fingerprint, card, blob.heads, files, blob.invocation
    adapter = Adapter(record.name, *parts)
    # the file has the sha256 recorded with this hash, so that the hash need not be computed again
    vars(adapter)["hash"] = record.hash
    return adapter


def examine_blob(path: Path, expected_hash: str) -> tuple[str, int, Mapping[str, Any]]:
    """Return the sha256, the size in bytes and the origin (the adapter's row) of the blob file at `path`.

    Raises AdapterCorrupt for another content hash, FileNotFoundError for no file.
    """
    blob = read_blob(path, "an unlisted adapter")
    if (actual_hash := blob.content_hash()) != expected_hash:
        raise AdapterCorrupt(f"the content of blob {path} has the hash {actual_hash}, not {expected_hash}")
    return file_digest(path), path.stat().st_size, blob.origin


def content_hash(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor] = MappingProxyType({}), invocation: tuple[int, ...] = ()
) -> str:
    """Return the hash of the content, computed anew, unlike `Adapter.hash`, which is cached at its first use."""
    return Adapter("", "", layers, heads=heads, invocation=invocation).hash


def take_apart(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor], *, stored_as: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (description, tensors by name): one packed fp32 tensor, and the tensors that the packing `stored_as` makes.

    "factors" means no packing. Raises AdapterUnsupported for an unknown packing, and for factors that it cannot hold.
    """
    # a registry takes a millisecond to list
    if stored_as != "factors" and stored_as not in (packings := registry.names("packings")):
        raise AdapterUnsupported(
            f"an adapter is stored as {' or '.join(map(repr, ['factors', *packings]))}, not as {stored_as!r}"
        )
    entries, tensors, packed = [], {}, []
    for number, (layer, factors) in enumerate(sorted(layers.items())):
        parts = factors.tensors()
        entry: dict[str, Any] = {"path": layer, "kind": factors.kind, "kernel": list(factors.kernel)}
        if stored_as != "factors":
            entry["shape"] = [len(factors.b_OR), *factors.a_RI.shape]
            packed += [(f"{part} of layer {layer!r}", parts.pop(part)) for part in PAIR]
        entries.append({**entry, "parts": list(parts)})
        # numbered, since a module path may hold any character
        tensors.update({f"{number}.{part}": tensor for part, tensor in parts.items()})
    description: dict[str, Any] = {"layers": entries}
    streams: dict[str, Tensor] = {}
    if stored_as != "factors":
        description["stored_as"] = stored_as
        streams = registry.get("packings", stored_as).pack(packed)
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
    listed = {f"{number}.{part}" for number, entry in enumerate(entries) for part in entry["parts"]}
    listed |= {f"head.{number}" for number in range(len(heads))}
    packing = None
    if stored_as != "factors":
        if stored_as not in registry.names("packings"):
            raise ValueError(f"it is stored as {stored_as!r:.60}, which nothing installed here reads")
        packing = registry.get("packings", stored_as)
        listed |= set(packing.names)
    if listed != set(names):
        raise ValueError(f"it lists {len(listed)} tensors that are not the {len(names)} it has")
    pairs = iter(packing.unpack({name: tensor(name) for name in packing.names}, _shapes(entries)) if packing else ())
    layers = {}
    for number, entry in enumerate(entries):
        parts: dict[str, Any] = {part: tensor(f"{number}.{part}") for part in entry["parts"]}
        if packing:
            parts |= {part: next(pairs) for part in PAIR}
        if entry["kind"] not in KINDS:
            raise ValueError(f"layer {entry['path']!r} is of the unknown kind {entry['kind']!r:.60}")
        layers[entry["path"]] = Factors(kind=entry["kind"], kernel=tuple(entry["kernel"]), **parts)
    if len(layers) != len(entries) or len(set(heads)) != len(heads):
        raise ValueError("it lists a layer or a head twice")
    return layers, {name: tensor(f"head.{number}") for number, name in enumerate(heads)}


def _shapes(entries: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the packed factors, layer by layer: (R, I) and then (O, R) of each."""
    shapes: list[tuple[int, ...]] = []
    for entry in entries:
        sizes = entry["shape"]
        if len(sizes) != 3 or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            raise ValueError(f"layer {entry['path']!r} has the shape {sizes!r:.60}, not (O, R, I)")
        num_out, rank, num_in = sizes
        shapes += [(rank, num_in), (num_out, rank)]
    return shapes


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
        match place:
            case [str() as name, offset, list() as shape] if len(shape) <= _MAX_AXES:
                # a loop: any() over a generator takes three times as long, and there are hundreds of places in a blob
                for number in (offset, *shape):
                    if type(number) is not int or not 0 <= number < 2**62:
                        raise ValueError(
                            f"the place of tensor {name!r:.60} is {place[1:]!r:.60}; an offset or size is not from 0 to 2^62"
                        )
            case _:
                raise ValueError(f"a place is {place!r:.60}, not [name, offset, shape] with at most {_MAX_AXES} axes")
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
