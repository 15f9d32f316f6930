"""Reads an adapter back from the store."""

from __future__ import annotations

from collections.abc import Callable

from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import read_blob
from loraweave.hub.kept_files import KeptFile, KeptFiles
from loraweave.hub.stored_files import file_bytes, listed, without_files
from loraweave.hub.stores.protocols import BlobStore
from loraweave.hub.stores.storage_errors import storage_errors
from loraweave.hub.tables.rows import Row


def stored_adapter(blobs: BlobStore, row: Row) -> Adapter:
    """The adapter that a row describes, its tensors mapped from the blob. AdapterCorrupt for a damaged or missing blob."""
    record = row.record
    who = f"adapter {record.name!r}"
    place = blobs.place(record.hash)
    with storage_errors(place, f"reading {who}"):
        try:
            blob = read_blob(blobs.local(record.hash, row.blob.file_sha256, who), who)
        except FileNotFoundError as error:
            raise AdapterCorrupt(f"{who}: blob {place} is missing; add the adapter again from its source") from error
    files = KeptFiles({name: KeptFile(*found, _reader(blobs, found[0], who)) for name, found in listed(record).items()})
    card = without_files(record.card)
    return Adapter(record.name, record.base_model, blob.layers, record.fingerprint, card, blob.heads, files)


def _reader(blobs: BlobStore, digest: str, who: str) -> Callable[[], bytes]:
    return lambda: file_bytes(blobs, digest, who)
