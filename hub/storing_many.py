"""Puts a batch of adapters into the store: all blobs first, complete and for good, then all rows in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from loraweave.errors import AdapterExists, HubError, HubFull
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import blob_bytes
from loraweave.hub.figures import Figures
from loraweave.hub.stored_files import put_files
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection
from loraweave.hub.stores.storage_errors import storage_errors
from loraweave.hub.storing import beside, put_rows, usable_blob, warn_of_base
from loraweave.hub.tables import known_bases, rows
from loraweave.types import Record

# read, checked and looked over
Prepared = tuple[Adapter, Record, Figures | None]


def store_many(
    catalogue: CatalogueStore,
    blobs: BlobStore,
    batch: Sequence[Prepared],
    *,
    stored_as: str,
    as_version: bool,
) -> list[Record | AdapterExists]:
    """For each of the batch, in order, the record as `store` gives it, or why its name cannot be used.

    Any other error leaves the catalogue as it was before the batch.
    """
    doing = f"adding {len(batch)} adapters"
    warned = []
    with catalogue.locked(doing):
        wanted = _wanted(catalogue, batch, as_version)
        known = {content: usable_blob(catalogue, blobs, content) for content in wanted}
        missing = {content: wanted[content] for content, blob in known.items() if blob is None}
        absent = [content for content in missing if not blobs.has(content)]
        try:
            with storage_errors(catalogue.where, doing):
                for content in known.keys() - missing.keys():
                    blobs.settle(content)
                written = _put(blobs, missing, stored_as)
                for adapter, _, _ in batch:
                    put_files(blobs, adapter.files)
            with catalogue.transaction(doing) as connection:
                outcomes: list[Record | AdapterExists] = []
                for _, record, figures in batch:
                    why = known_bases.contradiction(connection, record)
                    outcomes.append(_rows(connection, record, figures, known, written, as_version))
                    if why and isinstance(outcomes[-1], Record):
                        warned.append((outcomes[-1], why))
        except HubFull:
            # no row is there, and the space is needed; after other errors gc decides
            for content in absent:
                with suppress(OSError, HubError):
                    blobs.remove(content)
            raise
    for record, why in warned:
        warn_of_base(record, why)
    return outcomes


def _wanted(catalogue: CatalogueStore, batch: Sequence[Prepared], as_version: bool) -> dict[str, tuple[Adapter, Record]]:
    """Content hash -> the first that has it, of those whose name can be used as far as can be told beforehand."""
    wanted: dict[str, tuple[Adapter, Record]] = {}
    with catalogue.reading() as connection:
        for adapter, record, _ in batch:
            with suppress(AdapterExists):
                beside(rows.find(connection, record.name), record, as_version=as_version)
                wanted.setdefault(record.hash, (adapter, record))
    return wanted


def _put(blobs: BlobStore, missing: dict[str, tuple[Adapter, Record]], stored_as: str) -> dict[str, rows.BlobRow]:
    sizes = []

    def each() -> Iterator[tuple[str, bytes]]:
        # one at a time: a batch of large adapters need not fit into memory twice
        for content, (adapter, record) in missing.items():
            data = blob_bytes(adapter.layers, rows.encode(record), heads=adapter.heads, stored_as=stored_as)
            sizes.append(len(data))
            yield content, data

    digests = blobs.put_many(each()) if missing else []
    return {
        content: rows.BlobRow(content, digest, size_bytes)
        for content, digest, size_bytes in zip(missing, digests, sizes, strict=True)
    }


def _rows(
    connection: Connection,
    record: Record,
    figures: Figures | None,
    known: dict[str, rows.BlobRow | None],
    written: dict[str, rows.BlobRow],
    as_version: bool,
) -> Record | AdapterExists:
    existing = rows.find(connection, record.name)
    try:
        record = beside(existing, record, as_version=as_version)
    except AdapterExists as error:
        # two of one name in the batch: the first took it
        return error
    blob = written.get(record.hash) or known[record.hash]
    assert blob is not None
    return put_rows(connection, record, blob, existing, figures, written=record.hash in written)
