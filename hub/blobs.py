"""Blobs: an adapter's factors as one immutable safetensors file, named by the hash of its content.

A blob appears by rename, complete and on disk, and is never written again: processes have it mapped into memory. Its
metadata also holds what the catalogue knew when it was written, so that a hub whose catalogue is lost can be rebuilt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.blob_files import blob_path, file_digest, place_blob
from loraweave.types import Factors

FORMAT_VERSION = 1
_METADATA_KEY = "loraweave"


@dataclass(frozen=True)
class Blob:
    """What a blob holds: the layers, and the catalogue's row as it was when the blob was written."""

    layers: Mapping[str, Factors]
    origin: Mapping[str, Any]


def write_blob(folder: Path, layers: Mapping[str, Factors], content_hash: str, origin: str) -> tuple[str, int]:
    """Writes the layers' blob; returns the sha256 of the file and its size in bytes. `origin` is the record as JSON.

    The caller holds the write lock. An error leaves no temporary file behind.
    """
    data = _serialise(layers, origin)
    return place_blob(folder, blob_path(folder, content_hash), data), len(data)


def read_blob(path: Path, who: str) -> Blob:
    """The blob's content, its tensors mapped from the file. AdapterCorrupt, naming `who` and the path, for anything else."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_METADATA_KEY])
            if header["version"] != FORMAT_VERSION:
                raise AdapterCorrupt(f"{who}: blob {path} has version {header['version']}, not {FORMAT_VERSION}")
            listed = {f"{n}.{part}" for n, entry in enumerate(header["layers"]) for part in entry["parts"]}
            if listed != set(file.keys()):
                raise AdapterCorrupt(
                    f"{who}: blob {path} lists {len(listed)} tensors that are not the {len(file.keys())} it has"
                )
            layers = {
                entry["path"]: Factors(
                    kind=entry["kind"],
                    kernel=tuple(entry["kernel"]),
                    **{part: file.get_tensor(f"{number}.{part}") for part in entry["parts"]},
                )
                for number, entry in enumerate(header["layers"])
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, AdapterCorrupt | FileNotFoundError):
            raise
        raise AdapterCorrupt(f"{who}: blob {path} cannot be read ({type(error).__name__}: {error})") from error
    return Blob(layers, header["origin"])


def examine_blob(path: Path, expected_hash: str) -> tuple[str, int]:
    """The sha256 and the size of a file whose content has that hash. AdapterCorrupt, or FileNotFoundError, otherwise."""
    found = content_hash(read_blob(path, "an unlisted adapter").layers)
    if found != expected_hash:
        raise AdapterCorrupt(f"the content of blob {path} has the hash {found}, not {expected_hash}")
    return file_digest(path), path.stat().st_size


def content_hash(layers: Mapping[str, Factors]) -> str:
    """The hash of the layers as they are now: that of an `Adapter` is kept from when it was first asked for."""
    return Adapter("", "", layers).hash


def _serialise(layers: Mapping[str, Factors], origin: str) -> bytes:
    entries, tensors = [], {}
    for number, (layer, factors) in enumerate(sorted(layers.items())):
        parts = factors.tensors()
        entries.append({"path": layer, "kind": factors.kind, "kernel": list(factors.kernel), "parts": list(parts)})
        # numbered, since a module path may hold any character
        tensors.update({f"{number}.{part}": _own_fp32(tensor) for part, tensor in parts.items()})
    header = {"version": FORMAT_VERSION, "layers": entries, "origin": json.loads(origin)}
    data: bytes = save(tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
    return data


def _own_fp32(tensor: Tensor) -> Tensor:
    # cloned: layers may share a tensor, which safetensors refuses to write
    return tensor.detach().cpu().float().contiguous().clone()
