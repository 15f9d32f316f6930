"""Blobs: an adapter's content (factors, heads, invocation tokens) as one immutable safetensors file, named by its hash.

All fp32 numbers are one tensor, and the metadata lists the place of each part in it: opening a blob takes one map of the
file. A blob appears by rename, complete and on disk, and is never written again: processes have it mapped into memory. Its
metadata also holds the catalogue's row as of the writing, so that a hub whose catalogue is lost can be rebuilt.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loraweave.common.files import file_digest
from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.stores.packing import put_together, take_apart
from loraweave.types import Factors

# 1: one tensor for each factor; 2: heads too, or factors stored as "compeft"; 3: one packed tensor; 4: invocation tokens
# too, without which it would be another adapter
FORMAT_VERSIONS = (1, 2, 3, 4)
_METADATA_KEY = "loraweave"


@dataclass(frozen=True)
class Blob:
    """The content of a blob: an adapter's content, and its row in the catalogue (`origin`) as of the writing of the blob."""

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
    """Return the bytes of an adapter's blob. `origin` is JSON; `stored_as="compeft"` packs ternary factors, losslessly.

    Raises AdapterUnsupported if `stored_as` is "compeft" and a factor is not ternary.
    """
    description, tensors = take_apart(layers, heads, stored_as=stored_as)
    if invocation:
        description["invocation"] = list(invocation)
    header = {"version": 4 if invocation else 3, **description, "origin": json.loads(origin)}
    data: bytes = save(tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
    return data


def read_blob(path: Path, who: str) -> Blob:
    """Return the content of the blob at `path`, its tensors mapped from the file.

    Raises AdapterCorrupt, naming `who` and the path, if the file is no intact blob; FileNotFoundError if it is missing;
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


def examine_blob(path: Path, expected_hash: str) -> tuple[str, int]:
    """Return the sha256 and size of a blob. Raises AdapterCorrupt for another content hash, FileNotFoundError for none."""
    actual_hash = read_blob(path, "an unlisted adapter").content_hash()
    if actual_hash != expected_hash:
        raise AdapterCorrupt(f"the content of blob {path} has the hash {actual_hash}, not {expected_hash}")
    return file_digest(path), path.stat().st_size


def content_hash(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor] = MappingProxyType({}), invocation: tuple[int, ...] = ()
) -> str:
    """Return the hash of the content as it is now, unlike `Adapter.hash`, which is kept from its first use."""
    return Adapter("", "", layers, heads=heads, invocation=invocation).hash
