"""What a store has of an adapter: its content as one immutable blob, and its files, each named by its sha256.

The content is factors, heads and invocation tokens, named by its hash. All fp32 numbers are one tensor, and the metadata
has the place of each part in it: opening is one map of the file.
A blob appears by rename, complete and on disk, and is never written again: processes have it mapped into memory. Its
metadata also holds what the catalogue knew when it was written, so that a hub whose catalogue is lost can be rebuilt.
Files such as a tokenizer lie there once, whoever has them; the card lists them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loraweave.common.storage_errors import storage_errors
from loraweave.errors import AdapterCorrupt, HubError
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._kept_files import as_kept_files
from loraweave.hub.stores.folder_blobs import file_digest
from loraweave.hub.stores.packing import put_together, take_apart
from loraweave.hub.stores.protocols import BlobStore
from loraweave.types import Factors, Record

# 1: a tensor for every factor; 2: heads too, or factors in another form than their own; 3: one packed tensor; 4: that, and
# invocation tokens, without which it would be another adapter to a version that does not know them
FORMAT_VERSIONS = (1, 2, 3, 4)
_METADATA_KEY = "loraweave"


@dataclass(frozen=True)
class Blob:
    """What a blob holds: an adapter's content, and the catalogue's row as it was when the blob was written."""

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
    """The file of an adapter's content. `origin` is JSON; `stored_as="compeft"` keeps ternary factors in few bits, exactly.

    Raises AdapterUnsupported for factors that are not ternary then.
    """
    description, tensors = take_apart(layers, heads, stored_as=stored_as)
    if invocation:
        description["invocation"] = list(invocation)
    header = {"version": 4 if invocation else 3, **description, "origin": json.loads(origin)}
    data: bytes = save(tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
    return data


def read_blob(path: Path, who: str) -> Blob:
    """The blob's content, its tensors mapped from the file.

    AdapterCorrupt, naming `who` and the path, for any other content; FileNotFoundError, or OSError where the file system
    does not give it.
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
        # the file is opened twice, and what is deleted in between is missing all the same
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        # torch's way to say that a file cannot be opened or mapped, which is not the content's fault
        if "file" in str(error):
            raise OSError(errno.EIO, f"{who}: blob {path} cannot be mapped ({error})") from error
        raise AdapterCorrupt(f"{who}: blob {path} cannot be read ({error})") from error
    # a damaged ternary stream is AdapterCorrupt, hence a ValueError, already, but does not know the file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterCorrupt(f"{who}: blob {path} cannot be read ({type(error).__name__}: {error})") from error


def examine_blob(path: Path, expected_hash: str) -> tuple[str, int]:
    """The sha256 and the size of a file whose content has that hash. AdapterCorrupt, or FileNotFoundError, otherwise."""
    found = read_blob(path, "an unlisted adapter").content_hash()
    if found != expected_hash:
        raise AdapterCorrupt(f"the content of blob {path} has the hash {found}, not {expected_hash}")
    return file_digest(path), path.stat().st_size


def content_hash(
    layers: Mapping[str, Factors], heads: Mapping[str, Tensor] = MappingProxyType({}), invocation: tuple[int, ...] = ()
) -> str:
    """The hash of the content as it is now: that of an `Adapter` is kept from when it was first asked for."""
    return Adapter("", "", layers, heads=heads, invocation=invocation).hash


# of the card: {name: [sha256, size in bytes]}
LISTED = "kept_files"


def without_files(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card as an adapter has it."""
    return {key: value for key, value in card.items() if key != LISTED}


def with_files(card: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """The card as the catalogue has it, which lists the files."""
    table = {name: [file.sha256, file.size_bytes] for name, file in as_kept_files(files).files.items()}
    return {**without_files(card), **({LISTED: table} if table else {})}


def listed(record: Record) -> dict[str, tuple[str, int]]:
    """(sha256, size in bytes) of each of the adapter's files by name."""
    return {name: (str(digest), int(size)) for name, (digest, size) in record.card.get(LISTED, {}).items()}


def digests(records: Iterable[Record]) -> set[str]:
    """The sha256 of every file of these adapters."""
    return {digest for record in records for digest, _ in listed(record).values()}


def put_files(blobs: BlobStore, files: Mapping[str, bytes]) -> None:
    """Stores those that are not there, or are damaged. The caller holds the lock."""
    for name, file in as_kept_files(files).files.items():
        if blobs.has(file.sha256):
            with suppress(AdapterCorrupt, FileNotFoundError):
                blobs.local(file.sha256, file.sha256, name)
                blobs.settle(file.sha256)
                continue
        blobs.put(file.sha256, file.read())


@contextmanager
def reading_blob(blobs: BlobStore, content_hash: str, who: str) -> Iterator[None]:
    """Names the errors of reading a blob of `who` inside. AdapterCorrupt for one that is missing."""
    place = blobs.place(content_hash)
    with storage_errors(place, f"reading {who}"):
        try:
            yield
        except FileNotFoundError as error:
            raise AdapterCorrupt(f"{who}: blob {place} is missing; add the adapter again from its source") from error


def file_bytes(blobs: BlobStore, digest: str, who: str) -> bytes:
    """The bytes of a stored file. AdapterCorrupt for one that is missing or damaged."""
    with reading_blob(blobs, digest, who):
        return blobs.local(digest, digest, who).read_bytes()


def file_problems(blobs: BlobStore, record: Record, known: dict[str, str]) -> Iterator[str]:
    """What is wrong with the stored files of an adapter; `known` has what was found of each, which is read once."""
    for name, (digest, _) in listed(record).items():
        if fault := blob_fault(blobs, digest, known):
            yield f"{name} of adapter {record.name!r}: {fault}; add the adapter again from its source"


def blob_fault(blobs: BlobStore, digest: str, known: dict[str, str]) -> str:
    """What is wrong with a stored file, "" for nothing; `known` has what was found of each, which is read once."""
    if digest not in known:
        known[digest] = ""
        try:
            blobs.require(digest, digest, "the blob")
        except FileNotFoundError:
            known[digest] = f"blob {blobs.place(digest)} is missing"
        except (HubError, OSError) as error:
            known[digest] = str(error)
    return known[digest]
