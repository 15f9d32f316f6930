"""An adapter's files in the store: blobs named by their sha256, so that a tokenizer lies there once; the card lists them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from loraweave.common.storage_errors import storage_errors
from loraweave.errors import AdapterCorrupt, HubError
from loraweave.hub.formats._kept_files import as_kept_files
from loraweave.hub.stores.protocols import BlobStore
from loraweave.types import Record

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
