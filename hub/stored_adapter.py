"""Reads an adapter back from the store."""

from __future__ import annotations

from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import read_blob
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
    return Adapter(record.name, record.base_model, blob.layers, record.fingerprint, record.card, blob.heads)
