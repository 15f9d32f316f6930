"""The files of adapters as blobs named by their sha256: equal files are stored once; each card lists its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from loraweave.common.storage_errors import storage_errors
from loraweave.errors import AdapterCorrupt, HubError
from loraweave.hub.formats._kept_files import as_kept_files
from loraweave.hub.stores.protocols import BlobStore
from loraweave.types import Record

# the key of the card under which the files are listed: {name: [sha256, size in bytes]}
LISTED = "kept_files"


def without_files(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card as `Adapter.card` has it: without the list of files."""
    return {key: value for key, value in card.items() if key != LISTED}


def with_files(card: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the card as the catalogue stores it: with the list of files, if there are any."""
    table = {name: [file.sha256, file.size_bytes] for name, file in as_kept_files(files).files.items()}
    return {**without_files(card), **({LISTED: table} if table else {})}


def listed(record: Record) -> dict[str, tuple[str, int]]:
    """Return (sha256, size in bytes) of each of the adapter's files by name."""
    return {name: (str(digest), int(size)) for name, (digest, size) in record.card.get(LISTED, {}).items()}


def digests(records: Iterable[Record]) -> set[str]:
    """Return the sha256 of every file of these adapters."""
    return {digest for record in records for digest, _ in listed(record).values()}


def put_files(blobs: BlobStore, files: Mapping[str, bytes]) -> None:
    """Store the files that the store lacks or has damaged. The caller holds the lock."""
    for name, file in as_kept_files(files).files.items():
        if blobs.has(file.sha256):
            with suppress(AdapterCorrupt, FileNotFoundError):
                blobs.local(file.sha256, file.sha256, name)
                blobs.settle(file.sha256)
                continue
        blobs.put(file.sha256, file.read())


@contextmanager
def reading_blob(blobs: BlobStore, content_hash: str, who: str) -> Iterator[None]:
    """Name `who` in the errors of reading a blob inside. Raises AdapterCorrupt if the blob is missing."""
    place = blobs.place(content_hash)
    with storage_errors(place, f"reading {who}"):
        try:
            yield
        except FileNotFoundError as error:
            raise AdapterCorrupt(f"{who}: blob {place} is missing; add the adapter again from its source") from error


def file_bytes(blobs: BlobStore, digest: str, who: str) -> bytes:
    """Return the bytes of a stored file. Raises AdapterCorrupt if it is missing or damaged."""
    with reading_blob(blobs, digest, who):
        return blobs.local(digest, digest, who).read_bytes()


def file_problems(blobs: BlobStore, record: Record, known: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for each missing or damaged file of an adapter. `known` caches `blob_fault` by sha256."""
    for name, (digest, _) in listed(record).items():
        if fault := blob_fault(blobs, digest, known):
            yield f"{name} of adapter {record.name!r}: {fault}; add the adapter again from its source"


def blob_fault(blobs: BlobStore, digest: str, known: dict[str, str]) -> str:
    """Return what is wrong with a stored file, or "" if it is intact. `known` caches the answers by sha256."""
    if digest not in known:
        known[digest] = ""
        try:
            blobs.require(digest, digest, "the blob")
        except FileNotFoundError:
            known[digest] = f"blob {blobs.place(digest)} is missing"
        except (HubError, OSError) as error:
            known[digest] = str(error)
    return known[digest]
