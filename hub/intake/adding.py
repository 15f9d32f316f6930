"""Adding many adapters in batches: fewer waits for the disk, the same checks, and what is refused is told, not raised."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraweave.common.rows import GivenRows
from loraweave.errors import AdapterSuspicious, LoraweaveError
from loraweave.hub.adapter import Adapter
from loraweave.hub.examination import examined
from loraweave.hub.intake.admission import require_storable
from loraweave.hub.intake.new_record import new_record
from loraweave.hub.names import checked_name
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.storing_many import Prepared, store_many
from loraweave.types import Record

# a batch ends at either: what waits for it is lost when the process is killed, and lies in memory until then
MAX_BATCH = 256
MAX_BATCH_BYTES = 2**28


@dataclass(frozen=True)
class Addition:
    """What `Hub.add` takes, for one of many."""

    source: str | Path | Adapter
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
    sources: Iterable[str | Path | Adapter | Addition],
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
        outcomes = store_many(catalogue, blobs, waiting, stored_as=stored_as, as_version=replace) if waiting else []
        for (_, record, _), outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, Record):
                records.append(outcome)
            else:
                refused.append((record.name, outcome))
        waiting.clear()

    for source in _shown(sources, progress):
        addition = source if isinstance(source, Addition) else Addition(source)
        try:
            adapter, record = prepared(addition, stored_as=stored_as, allow_pickle=allow_pickle)
        except LoraweaveError as error:
            refused.append((addition.label, error))
            continue
        try:
            # what else fails here is the hub's own store, for which no adapter is to blame
            waiting.append((adapter, *examined(catalogue, blobs, adapter, record, anomalies)))
        except AdapterSuspicious as error:
            refused.append((addition.label, error))
            continue
        waiting_bytes += sum(t.nbytes for factors in waiting[-1][0].layers.values() for t in factors.tensors().values())
        if len(waiting) >= MAX_BATCH or waiting_bytes >= MAX_BATCH_BYTES:
            settle()
            waiting_bytes = 0
    settle()
    return Added(tuple(records), tuple(refused))


def prepared(addition: Addition, *, stored_as: str, allow_pickle: bool) -> tuple[Adapter, Record]:
    """The adapter that is to be added, read and checked, and its record. Raises what `Hub.add` raises before it writes."""
    source, name = addition.source, addition.name
    adapter = (
        source if isinstance(source, Adapter) else Adapter.from_pretrained(source, name=name, allow_pickle=allow_pickle)
    )
    given = {
        "description": addition.description,
        "examples": addition.examples,
        "tags": addition.tags,
        "license": addition.license,
        "language": addition.language,
    }
    own_name = checked_name(adapter.name if name is None else name)
    place = None if isinstance(source, Adapter) else source
    record = new_record(adapter, own_name, given, addition.base_model, place)
    require_storable(adapter, stored_as)
    return adapter, record


def _shown(sources: Iterable[str | Path | Adapter | Addition], progress: bool) -> Iterator[str | Path | Adapter | Addition]:
    if not progress:
        yield from sources
        return
    from rich.console import Console
    from rich.progress import track

    total = len(sources) if isinstance(sources, Collection) else None
    yield from track(sources, description="adding adapters", total=total, console=Console(stderr=True))
