"""Adds many adapters in batches: the same checks with fewer waits for the disk; refusals are reported, not raised."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

from loraweave.common.display import tracked
from loraweave.common.names import checked_name, now
from loraweave.common.rows import GivenRows
from loraweave.errors import AdapterCorrupt, AdapterSuspicious, AdapterUnsupported, LoraweaveError
from loraweave.hub import licenses
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import require_numbers
from loraweave.hub.health.anomalies import examine
from loraweave.hub.intake.discover import Found
from loraweave.hub.intake.fields import (
    MAX_LABEL_BYTES,
    OWN_FIELDS,
    card_with_outputs,
    checked_fields,
    checked_text,
    split_pairs,
)
from loraweave.hub.intake.sources import without_secrets
from loraweave.hub.stores.blobs import content_hash
from loraweave.hub.stores.kept_files import with_files
from loraweave.hub.stores.packing import take_apart
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.stores.storing import Prepared, store
from loraweave.hub.tables import rows
from loraweave.hub.targets._target import last_names
from loraweave.lowrank import algebra
from loraweave.types import Factors, Record, Source

# a batch ends at either: what waits for it is lost when the process is killed, and lies in memory until then
MAX_BATCH = 256
MAX_BATCH_BYTES = 2**28


@dataclass(frozen=True)
class Addition:
    """What `Hub.add` takes, for one of many."""

    source: str | Path | Adapter | Found
    name: str | None = None
    description: str = ""
    examples: GivenRows = ()
    tags: Collection[str] = ()
    license: str | None = None
    base_model: str | None = None
    language: Collection[str] | str = ()

    @property
    def label(self) -> str:
        """What to call it before its name is known."""
        return self.name or (self.source.name if isinstance(self.source, Adapter) else str(self.source))


@dataclass(frozen=True)
class Added:
    """The records that are there now, in the order of the sources, and for each other source why it was refused."""

    records: tuple[Record, ...]
    refused: tuple[tuple[str, LoraweaveError], ...]


def add_many(
    catalogue: CatalogueStore,
    blobs: BlobStore,
    sources: Iterable[str | Path | Adapter | Found | Addition],
    *,
    stored_as: str,
    allow_pickle: bool,
    replace: bool,
    anomalies: str | Mapping[str, str],
    progress: bool,
) -> Added:
    """Adds all, batch by batch; `Hub.add_many`."""
    records: list[Record] = []
    refused: list[tuple[str, LoraweaveError]] = []
    waiting: list[Prepared] = []
    waiting_bytes = 0

    def settle() -> None:
        for record, error in store(catalogue, blobs, waiting, stored_as=stored_as, as_version=replace) if waiting else ():
            if error is None:
                records.append(record)
            else:
                refused.append((record.name, error))
        waiting.clear()

    for source in tracked(sources, "adding adapters", total=length_hint(sources) or None, shown=progress):
        addition = source if isinstance(source, Addition) else Addition(source)
        try:
            adapter, record = prepare(addition, stored_as=stored_as, allow_pickle=allow_pickle)
        except LoraweaveError as error:
            refused.append((addition.label, error))
            continue
        try:
            # what else fails here is the hub's own store, for which no adapter is to blame
            waiting.append((adapter, *examine(catalogue, blobs, adapter, record, anomalies)))
        except AdapterSuspicious as error:
            refused.append((addition.label, error))
            continue
        waiting_bytes += sum(t.nbytes for factors in waiting[-1][0].layers.values() for t in factors.tensors().values())
        if len(waiting) >= MAX_BATCH or waiting_bytes >= MAX_BATCH_BYTES:
            settle()
            waiting_bytes = 0
    settle()
    return Added(tuple(records), tuple(refused))


def prepare(addition: Addition, *, stored_as: str, allow_pickle: bool) -> tuple[Adapter, Record]:
    """The adapter that is to be added, read and checked, and its record. Raises what `Hub.add` raises before it writes."""
    source, name = addition.source, addition.name
    adapter = (
        source if isinstance(source, Adapter) else Adapter.from_pretrained(source, name=name, allow_pickle=allow_pickle)
    )
    given = {key: getattr(addition, key) for key in OWN_FIELDS}
    own_name = checked_name(adapter.name if name is None else name)
    record = new_record(adapter, own_name, given, addition.base_model, None if source is adapter else str(source))
    _require_storable(adapter, stored_as)
    if source is adapter:
        # of what was read, reading has looked at every number
        require_numbers(adapter.layers, adapter.heads, f"adapter {adapter.name!r},")
    return adapter, record


def _require_storable(adapter: Adapter, stored_as: str) -> None:
    """AdapterCorrupt for factors that do not fit each other, AdapterUnsupported for no effect and no form in `stored_as`."""
    for layer, factors in adapter.layers.items():
        _require_shapes(f"adapter {adapter.name!r}, layer {layer!r}", factors)
    if not adapter.heads and all(algebra.is_zero(factors) for factors in adapter.layers.values()):
        raise AdapterUnsupported(
            f"adapter {adapter.name!r} is without effect: the updates of all its {len(adapter.layers)} layers are zero; "
            "was it saved before training, or with alpha 0?"
        )
    if stored_as != "factors":
        take_apart(adapter.layers, {}, stored_as=stored_as)


def _require_shapes(where: str, factors: Factors) -> None:
    a, b = tuple(factors.a_RI.shape), tuple(factors.b_OR.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (a[1], b[0]):
        raise AdapterCorrupt(f"{where}: a_RI has shape {a} and b_OR {b}, which do not fit as (rank, in) and (out, rank)")
    vectors = {part: tensor for part, tensor in factors.tensors().items() if part not in ("a_RI", "b_OR")}
    for part, tensor in vectors.items():
        if tuple(tensor.shape) != (b[0],):
            raise AdapterCorrupt(f"{where}: {part} has shape {tuple(tensor.shape)}, but the layer has {b[0]} outputs")
    if a[0] == 0 and not vectors:
        raise AdapterCorrupt(f"{where}: the update has rank 0 and nothing else")


def new_record(adapter: Adapter, name: str, given: Mapping[str, Any], base_model: str | None, place: str | None) -> Record:
    """The record of version 1 under that name. AdapterUnsupported for fields of a wrong type or above their limit."""
    inputs, outputs = split_pairs(name, given["examples"])
    fields = checked_fields(name, _fields_with_card(name, {**given, "examples": inputs}, adapter.card))
    card = card_with_outputs(adapter.card, adapter.card.get("examples") or None, fields.examples, outputs)
    card = with_files(card, adapter.files)
    revision = adapter.base.revision
    record = Record(
        name=name,
        hash=content_hash(adapter.layers, adapter.heads, adapter.invocation),
        base_model=checked_text(name, "base_model", base_model or adapter.base_model, MAX_LABEL_BYTES),
        rank=adapter.rank,
        target_modules=last_names(adapter.layers),
        **vars(fields),
        size_bytes=0,
        created=now(),
        fingerprint=adapter.fingerprint,
        base_revision=revision if revision is not None and len(revision) <= MAX_LABEL_BYTES else None,
        source=_source(adapter.card, place),
        card=card,
    )
    rows.encode_within_limit(record)
    return record


def _fields_with_card(name: str, given: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """The fields given; the card's value where none was."""
    fields = {key: given[key] or card.get(key) or given[key] for key in OWN_FIELDS}
    if fields["license"]:
        said = checked_text(name, "license", fields["license"], MAX_LABEL_BYTES)
        fields["license"] = licenses.canonical(said) if given["license"] else licenses.of_card(said, f"adapter {name!r}")
    return fields


def _source(card: Mapping[str, Any], place: str | None) -> Source | None:
    """The repository and commit that the card has from reading it, else the place as the caller named it."""
    match card.get("source"):
        case {"repository": str() as repository, "revision": str() as revision} if place in (None, repository):
            return Source(repository, revision)
        case {"repository": str() as repository} if place in (None, repository):
            return Source(repository, None)
    return None if place is None else Source(without_secrets(place))
