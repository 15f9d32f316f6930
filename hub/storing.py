"""Puts an adapter into the store: the blob first, complete and for good, then the rows in one transaction."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace

from loraweave.errors import AdapterCorrupt, AdapterExists, HubCorrupt, HubError, HubFull
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import examine_blob, write_blob
from loraweave.hub.fields import OWN_FIELDS
from loraweave.hub.figures import Figures
from loraweave.hub.stored_files import LISTED, listed, put_files
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection
from loraweave.hub.stores.storage_errors import storage_errors
from loraweave.hub.tables import known_bases, rows, versions
from loraweave.hub.tables.figure_rows import store_figures
from loraweave.types import Record


def store(
    catalogue: CatalogueStore,
    blobs: BlobStore,
    adapter: Adapter,
    record: Record,
    *,
    stored_as: str,
    as_version: bool,
    figures: Figures | None,
) -> Record:
    """The record as stored. What is there already, content and name, is not written again, and its record is returned.

    Other content under the name becomes the next version with `as_version`, and is AdapterExists without.
    """
    doing = f"adding adapter {record.name!r}"
    with catalogue.locked(doing):
        with catalogue.reading() as connection:
            existing = rows.find(connection, record.name)
            other_base = known_bases.contradiction(connection, record)
        record = beside(existing, record, as_version=as_version)
        stored = _store(catalogue, blobs, adapter, record, existing, stored_as, figures)
    if other_base:
        warn_of_base(record, other_base)
    return stored


def beside(existing: rows.Row | None, record: Record, *, as_version: bool) -> Record:
    """The record as it can be stored beside what its name stands for now. AdapterExists when that is other content."""
    if existing is None or existing.record.hash == record.hash:
        return record
    if not as_version:
        raise AdapterExists(
            f"adding adapter {record.name!r}: the name stands for another adapter, with hash {existing.record.hash}, not "
            f"{record.hash}; pass replace=True to make this one its next version, hub.remove({record.name!r}) first, or "
            "choose another name"
        )
    return _successor(existing.record, record)


def warn_of_base(record: Record, other_base: str) -> None:
    warnings.warn(
        f"adapter {record.name!r} is stored, but its base {record.base_model!r} is not the model that others in this "
        f"hub call so: {other_base}; a search for a model at hand, base_model=lw.base_key(model), tells them apart",
        stacklevel=4,
    )


def _successor(old: Record, new: Record) -> Record:
    """The next version; what people wrote about the adapter stays where nothing new was said."""
    kept = {key: getattr(new, key) or getattr(old, key) for key in OWN_FIELDS}
    return replace(new, version=old.version + 1, **kept)


def _store(
    catalogue: CatalogueStore,
    blobs: BlobStore,
    adapter: Adapter,
    record: Record,
    existing: rows.Row | None,
    stored_as: str,
    figures: Figures | None,
) -> Record:
    """The caller holds the lock."""
    doing = f"adding adapter {record.name!r}"
    absent = not blobs.has(record.hash)
    try:
        with storage_errors(catalogue.where, doing):
            known = usable_blob(catalogue, blobs, record.hash)
            written = known is None
            if known is None:
                origin = rows.encode(record)
                placed = write_blob(blobs, adapter.layers, record.hash, origin, heads=adapter.heads, stored_as=stored_as)
                known = rows.BlobRow(record.hash, *placed)
            else:
                blobs.settle(record.hash)
            put_files(blobs, adapter.files)
        with catalogue.transaction(doing) as connection:
            return put_rows(connection, record, known, existing, figures, written=written)
    except HubFull:
        # the row is certainly not there, and the space is needed; after other errors gc decides
        if absent:
            with suppress(OSError, HubError):
                blobs.remove(record.hash)
        raise


def put_rows(
    connection: Connection,
    record: Record,
    blob: rows.BlobRow,
    existing: rows.Row | None,
    figures: Figures | None,
    *,
    written: bool,
) -> Record:
    """Stores the rows of an adapter whose blob is there, written just now or before; returns its record."""
    is_new = existing is None or existing.record.hash != record.hash
    if is_new:
        known_bases.remember(connection, record)
    if written or is_new:
        rows.put_blob(connection, blob)
    if existing is not None and not is_new:
        return _with_its_files(connection, existing, record)
    stored = rows.insert(connection, record) if existing is None else versions.supersede(connection, existing, record)
    if figures is not None:
        store_figures(connection, record.name, record.hash, figures)
    return stored


def _with_its_files(connection: Connection, existing: rows.Row, record: Record) -> Record:
    """The record of content that is stored under its name already; files that it came without are noted."""
    own, given = listed(existing.record), listed(record)
    if given and not own:
        return rows.change(
            connection, existing, replace(existing.record, card={**existing.record.card, LISTED: record.card[LISTED]})
        )
    if given and given != own:
        warnings.warn(
            f"adapter {record.name!r} is stored already, with other files beside it ({', '.join(own)}), which stay; remove "
            "it first, or give it another name, to have these",
            stacklevel=5,
        )
    return existing.record


def usable_blob(catalogue: CatalogueStore, blobs: BlobStore, content: str) -> rows.BlobRow | None:
    """The stored blob of that content; None when there is none or it is damaged, and is to be written."""
    try:
        with catalogue.reading() as connection:
            known = rows.find_blob(connection, content)
    except HubCorrupt:
        known = None
    try:
        if known is None:
            return rows.BlobRow(content, *examine_blob(blobs.local(content, None, "blob"), content))
        blobs.require(content, known.file_sha256, "blob")
    except (AdapterCorrupt, FileNotFoundError):
        return None
    return known
