"""Deletes what no row of the catalogue names."""

from __future__ import annotations

from contextlib import suppress

from loraweave.errors import HubCorrupt, HubFull
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.errors import storage_errors
from loraweave.hub.stores.kept_files import digests
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.tables import filtering, rows, versions
from loraweave.types import Record


def collect(catalogue: CatalogueStore, blobs: BlobStore) -> int:
    """Deletes blobs and files that no version of an adapter has, and what killed writers left; returns the bytes freed.

    HubCorrupt, with nothing deleted, when a row is damaged or missing: a blob might be its.
    """
    doing = "collecting unused blobs"
    with catalogue.locked(doing):
        records = _records(catalogue, doing)
        named = {record.hash for record in records} | digests(records)
        freed = 0
        with storage_errors(catalogue.where, doing):
            # under the lock every temporary file is a dead writer's
            freed += blobs.sweep(older_than_s=0.0)
            for content_hash in blobs.names():
                if content_hash not in named:
                    freed += blobs.remove(content_hash)
        # files first: on a full disk the catalogue can be written only once they are gone, and a blob's row without its
        # file does no harm, so that a next call may do what this one could not
        with suppress(HubFull), catalogue.transaction(doing) as connection:
            filtering.tidy(connection, records)
            connection.execute(
                "DELETE FROM blobs WHERE hash NOT IN (SELECT hash FROM adapters UNION SELECT hash FROM versions)"
            )
        catalogue.empty_log()
    return freed


def _records(catalogue: CatalogueStore, doing: str) -> list[Record]:
    """Those of all versions of all adapters. HubCorrupt when one is damaged or missing."""
    with catalogue.reading() as connection:
        newest = [row.record for row in rows.every(connection)]
        older = [old.record for key in versions.every(connection) if (old := versions.at(connection, *key))]
        counted = state_row(connection, "num_adapters, num_versions", catalogue.where)
    kinds = ("adapters", newest, counted[0]), ("superseded versions", older, counted[1])
    for what, listed, num_added in kinds:
        if len(listed) != num_added:
            raise HubCorrupt(
                f"{doing}: the catalogue has the rows of {len(listed)} {what}, but {num_added} were added; nothing was "
                "deleted, and Hub.verify() lists what can still be read"
            )
    return [*newest, *older]
