"""Storing adapters in a hub: the blob first, complete and durable, then the rows in one transaction."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loraweave.common.files import storage_errors
from loraweave.errors import AdapterCorrupt, AdapterExists, HubCorrupt, HubError, HubFull, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import Parts, base_key, model_of, require_same_base
from loraweave.hub.base_layer import base_layer, expert_matrix
from loraweave.hub.stores.blobs import blob_bytes, examine_blob
from loraweave.hub.stores.folder_blobs import LISTED, listed, put_files
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection
from loraweave.hub.tables import filtering, rows, versions
from loraweave.hub.tables.fields import OWN_FIELDS
from loraweave.types import Record


def beside(existing: rows.Row | None, record: Record, *, as_version: bool) -> Record:
    """Return `record`, as the next version of `existing` if contents differ (AdapterExists unless `as_version`)."""
    if existing is None or existing.record.hash == record.hash:
        return record
    if not as_version:
        raise AdapterExists(
            f"adding adapter {record.name!r}: the name stands for another adapter, with hash {existing.record.hash}, not "
            f"{record.hash}; pass replace=True to make this one its next version, hub.remove({record.name!r}) first, or "
            "choose another name"
        )
    # fields that people wrote about the adapter stay unless the new record sets them
    kept = {key: getattr(record, key) or getattr(existing.record, key) for key in OWN_FIELDS}
    return replace(record, version=existing.record.version + 1, **kept)


def _with_its_files(connection: Connection, existing: rows.Row, record: Record) -> Record:
    """Return the existing record of the same content, with the new one's files if it had none; warn if both differ."""
    old_files, new_files = listed(existing.record), listed(record)
    if new_files and not old_files:
        return rows.change(
            connection, existing, replace(existing.record, card={**existing.record.card, LISTED: record.card[LISTED]})
        )
    if new_files and new_files != old_files:
        warnings.warn(
            f"adapter {record.name!r} is stored already, with other files beside it ({', '.join(old_files)}), which stay; "
            "remove it first, or give it another name, to have these",
            stacklevel=5,
        )
    return existing.record


def recorded_blob(catalogue: CatalogueStore, content: str) -> rows.BlobRow | None:
    """Return the row of the blob with that content, or None if it is missing or damaged."""
    try:
        with catalogue.reading() as connection:
            return rows.find_blob(connection, content)
    except HubCorrupt:
        return None


def usable_blob(catalogue: CatalogueStore, blobs: BlobStore, content: str) -> rows.BlobRow | None:
    """Return the row of the stored blob with that content, or None if it is missing or damaged and must be written."""
    known = recorded_blob(catalogue, content)
    try:
        if known is None:
            return rows.BlobRow(content, *examine_blob(blobs.local(content, None, "blob"), content)[:2])
        blobs.require(content, known.file_sha256, "blob")
    except (AdapterCorrupt, FileNotFoundError):
        return None
    return known


@dataclass(frozen=True)
class Prepared:
    """An adapter that was read and checked, its record, and an examiner's `figures`, which have a method `store`.

    In a subclass whose content is in the store already, `adapter` is None.
    """

    adapter: Adapter | None
    record: Record
    figures: Any = None
    num_bytes: int = 0

    @property
    def has_written(self) -> bool:
        """True if the adapter's blob was written to the store when the adapter was read."""
        return False

    def read(self, blobs: BlobStore) -> Adapter:
        """Return the adapter."""
        assert self.adapter is not None
        return self.adapter

    def usable_blob(self, catalogue: CatalogueStore, blobs: BlobStore) -> rows.BlobRow | None:
        """Return the row of the stored blob of this adapter's content, or None if the blob must be written."""
        return usable_blob(catalogue, blobs, self.record.hash)


def store(
    catalogue: CatalogueStore, blobs: BlobStore, batch: Sequence[Prepared], *, stored_as: str, as_version: bool
) -> list[tuple[Record, AdapterExists | None]]:
    """Store a batch; return, in order, each adapter's record and None, or its AdapterExists error if the name is taken.

    Content that the name has already is not written again, and its record is returned. If the name has other content, the
    new content becomes its next version with `as_version`, and an AdapterExists error without. Any error that is raised
    leaves the catalogue as it was before the batch.
    """
    doing = _doing(batch)
    outcomes: list[tuple[Record, AdapterExists | None]] = []
    warned = []
    with catalogue.locked(doing):
        wanted = _new_content(catalogue, batch, as_version)
        known = {content: prepared.usable_blob(catalogue, blobs) for content, prepared in wanted.items()}
        absent = [content for content, blob in known.items() if blob is None and not blobs.has(content)]
        try:
            with storage_errors(catalogue.where, doing):
                written = put_content(blobs, batch, wanted, known, stored_as)
            with catalogue.transaction(doing) as connection:
                for prepared in batch:
                    existing = rows.find(connection, prepared.record.name)
                    other_base = filtering.contradiction(connection, prepared.record)
                    try:
                        new = beside(existing, prepared.record, as_version=as_version)
                    except AdapterExists as error:
                        # also for the second of two in the batch with one name: the first took it
                        outcomes.append((prepared.record, error))
                        continue
                    blob = written.get(new.hash) or known[new.hash]
                    assert blob is not None
                    is_written = new.hash in written or wanted[new.hash].has_written
                    stored = _put_rows(connection, replace(prepared, record=new), blob, existing, is_written)
                    outcomes.append((stored, None))
                    if other_base:
                        warned.append((stored, other_base))
        except HubFull:
            # these blobs have no rows, and the space is needed; after other errors they are left to gc
            for content in absent:
                with suppress(OSError, HubError):
                    blobs.remove(content)
            raise
    for record, why in warned:
        warnings.warn(
            f"adapter {record.name!r} is stored, but its base {record.base_model!r} is not the model that others in this "
            f"hub call so: {why}; a search for a model at hand, base_model=lw.base_key(model), tells them apart",
            stacklevel=3,
        )
    return outcomes


def _put_rows(
    connection: Connection, prepared: Prepared, blob: rows.BlobRow, existing: rows.Row | None, is_written: bool
) -> Record:
    """Store the rows of an adapter whose blob is in the store, written just now or before, and return its record."""
    record = prepared.record
    is_new = existing is None or existing.record.hash != record.hash
    if is_new:
        filtering.remember(connection, record)
    if is_written or is_new:
        rows.put_blob(connection, blob)
    if existing is not None and not is_new:
        return _with_its_files(connection, existing, record)
    stored = rows.insert(connection, record) if existing is None else versions.supersede(connection, existing, record)
    if prepared.figures is not None:
        prepared.figures.store(connection, record.name, record.hash)
    return stored


def _doing(batch: Sequence[Prepared]) -> str:
    return f"adding adapter {batch[0].record.name!r}" if len(batch) == 1 else f"adding {len(batch)} adapters"


def _new_content(catalogue: CatalogueStore, batch: Sequence[Prepared], as_version: bool) -> dict[str, Prepared]:
    """Map each content hash to the first adapter of the batch with this content whose name can be used."""
    wanted: dict[str, Prepared] = {}
    taken: dict[str, str] = {}
    with catalogue.reading() as connection:
        for prepared in batch:
            with suppress(AdapterExists):
                new = beside(rows.find(connection, prepared.record.name), prepared.record, as_version=as_version)
                # of two with one name the first takes it, as when the rows are stored
                if as_version or taken.setdefault(new.name, new.hash) == new.hash:
                    wanted.setdefault(new.hash, replace(prepared, record=new))
    return wanted


def put_content(
    blobs: BlobStore,
    batch: Sequence[Prepared],
    wanted: Mapping[str, Prepared],
    known: Mapping[str, rows.BlobRow | None],
    stored_as: str,
) -> dict[str, rows.BlobRow]:
    """Write the batch's missing blobs and files, make the others durable; return new rows by hash. Needs the lock."""
    missing = {content: prepared for content, prepared in wanted.items() if known[content] is None}
    for content in known.keys() - missing.keys():
        blobs.settle(content)
    sizes = []

    def data() -> Iterator[tuple[str, bytes]]:
        # one at a time: a batch of large adapters need not fit into memory twice
        for content, prepared in missing.items():
            adapter = prepared.read(blobs)
            parts = {"heads": adapter.heads, "invocation": adapter.invocation, "stored_as": stored_as}
            file = blob_bytes(adapter.layers, rows.encode(prepared.record), **parts)  # type: ignore[arg-type]
            sizes.append(len(file))
            yield content, file

    digests_of = blobs.put_many(data()) if missing else []
    for prepared in batch:
        # adapters with the same content may have different files
        if prepared.adapter is not None and prepared.record.hash in wanted:
            put_files(blobs, prepared.adapter.files)
    return {
        content: rows.BlobRow(content, digest, size_bytes)
        for content, digest, size_bytes in zip(missing, digests_of, sizes, strict=True)
    }


def bound_record(record: Record, adapter: Adapter, model: Any) -> Record:
    """Return the record with the model's revision and fingerprint, and its id if the adapter names no base.

    Raises BaseModelMismatch if the adapter records another fingerprint or revision, LayerMismatch if a layer does not fit.
    """
    model = model_of(model)
    key = base_key(model)
    # ids are not compared: a model loaded from a folder has the folder's name as its id
    require_same_base(f"adapter {record.name!r}", record.base, key, whatever_id=True)
    modules = dict(model.named_modules())
    paths = model.paths(adapter.layers, f"adapter {record.name!r}") if isinstance(model, Parts) else {}
    for layer, factors in adapter.layers.items():
        if factors.kind == "expert":
            expert_matrix(modules, layer, factors, f"adapter {record.name!r}")
            continue
        model_layer = base_layer(modules, paths.get(layer, layer), f"adapter {record.name!r}")
        wanted = factors.b_OR.shape[0], factors.a_RI.shape[1]
        if factors.rank and wanted != (model_layer.num_outputs, model_layer.num_inputs):
            raise LayerMismatch(
                f"adapter {record.name!r} updates layer {layer!r} with shape {wanted}, but that of the model {key.id!r} is "
                f"{(model_layer.num_outputs, model_layer.num_inputs)}; it was made for another base model"
            )
    return replace(
        record,
        base_model=record.base_model or key.id,
        base_revision=key.revision or record.base_revision,
        fingerprint=key.fingerprint,
    )
