"""The addition of one adapter, or of many in batches: the same checks, fewer waits for the disk, and reported refusals.

A mixture of adapters that another library saved is stored as a composition with its adapters. Extensions know the layouts:
a file `router_files.py` has FILES, the patterns of the files to download; `is_router(folder)`; `is_mixture(folder)`, false
if the folder is also an adapter; and `read(folder, pool, model)`, which returns the router.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loraweave.registry as registry
from loraweave.common.display import tracked
from loraweave.common.names import checked_name, now
from loraweave.common.rows import GivenRows
from loraweave.errors import AdapterCorrupt, AdapterSuspicious, AdapterUnsupported, HubError, LoraweaveError
from loraweave.hub import licenses
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import require_numbers
from loraweave.hub.formats._peft_config import module_names
from loraweave.hub.sources import Repository, name_of, without_secrets
from loraweave.hub.stores.blobs import content_hash, take_apart
from loraweave.hub.stores.folder_blobs import with_files
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.stores.storing import Prepared, store
from loraweave.hub.tables import rows
from loraweave.hub.tables.fields import (
    MAX_LABEL_BYTES,
    OWN_FIELDS,
    card_with_outputs,
    checked_fields,
    checked_text,
    split_pairs,
)
from loraweave.lowrank import algebra
from loraweave.types import Factors, Record, Source

if TYPE_CHECKING:
    from loraweave.hub.compositions import CompositionShelf, StoredComposition

# a batch ends at either limit: it is in memory until then, and lost if the process is killed
MAX_BATCH = 256
MAX_BATCH_BYTES = 2**28

KINDS = ("norm", "layer_norm", "spectrum", "layer_spectra", "base_norm", "duplicate")
POLICIES = ("off", "report", "quarantine", "refuse")


@dataclass(frozen=True)
class Addition:
    """The arguments of `Hub.add` for one of many adapters."""

    source: str | Path | Adapter | Repository
    name: str | None = None
    description: str = ""
    examples: GivenRows = ()
    tags: Collection[str] = ()
    license: str | None = None
    base_model: str | None = None
    language: Collection[str] | str = ()

    @property
    def label(self) -> str:
        """The name for messages before the adapter's name is known."""
        return self.name or (self.source.name if isinstance(self.source, Adapter) else str(self.source))


@dataclass(frozen=True)
class Added:
    """The records that are stored now, in the order of the sources, and (name, error) of each refused source."""

    records: tuple[Record, ...]
    refused: tuple[tuple[str, LoraweaveError], ...]


def add_many(
    hub: CompositionShelf,
    sources: Iterable[str | Path | Adapter | Repository | Addition],
    *,
    stored_as: str,
    allow_pickle: bool,
    replace: bool,
    anomalies: str | Mapping[str, str],
    progress: bool,
    n_jobs: int | None,
) -> Added:
    """Add all sources, batch by batch; see `Hub.add_many`."""
    from loraweave.common.spread import processes_here, spreader

    catalogue, blobs = hub._catalogue, hub._blobs
    records: list[Record] = []
    refused: list[tuple[str, LoraweaveError]] = []
    waiting: list[Prepared] = []
    waiting_bytes = 0
    left_out: list[Prepared] = []

    def settle() -> None:
        stored = store(catalogue, blobs, waiting, stored_as=stored_as, as_version=replace) if waiting else []
        for prepared, (record, error) in zip(waiting, stored, strict=True):
            if error is None:
                records.append(record)
            else:
                refused.append((record.name, error))
                left_out.append(prepared)
        waiting.clear()

    reading: dict[str, Any] = {"stored_as": stored_as, "allow_pickle": allow_pickle}
    workers = None
    # adapters in memory stay in this process
    if processes_here(n_jobs) is not None and isinstance(sources, Sequence):
        additions = [_addition(source) for source in sources]
        if not any(isinstance(addition.source, Adapter) for addition in additions):
            workers = spreader("reading", n_jobs)
    if workers is not None:
        outcomes = workers.read_many(hub, additions, anomalies=anomalies, n_jobs=n_jobs, progress=progress, **reading)
    else:
        items = tracked(sources, "adding adapters", total=length_hint(sources) or None, shown=progress)
        outcomes = ((addition, _try_to_read(addition, **reading)) for addition in map(_addition, items))
    for addition, prepared in outcomes:
        if isinstance(prepared, LoraweaveError):
            refused.append((addition.label, prepared))
            continue
        try:
            # any other error here is one of the hub's own store, not of the adapter, and is raised
            waiting.append(examine(catalogue, blobs, prepared, anomalies))
        except AdapterSuspicious as error:
            refused.append((addition.label, error))
            left_out.append(prepared)
            continue
        waiting_bytes += prepared.num_bytes
        if len(waiting) >= MAX_BATCH or waiting_bytes >= MAX_BATCH_BYTES:
            settle()
            waiting_bytes = 0
    settle()
    if workers is not None:
        workers.drop(hub, left_out)
    return Added(tuple(records), tuple(refused))


def _addition(source: str | Path | Adapter | Repository | Addition) -> Addition:
    return source if isinstance(source, Addition) else Addition(source)


def _try_to_read(addition: Addition, **reading: Any) -> Prepared | LoraweaveError:
    try:
        return prepare(addition, **reading)
    except LoraweaveError as error:
        return error


def prepare(addition: Addition, *, stored_as: str, allow_pickle: bool) -> Prepared:
    """Return the adapter to add, read and checked, and its record. Raises what `Hub.add` raises before it writes."""
    source, name = addition.source, addition.name
    adapter = (
        source if isinstance(source, Adapter) else Adapter.from_pretrained(source, name=name, allow_pickle=allow_pickle)
    )
    fields = {key: getattr(addition, key) for key in OWN_FIELDS}
    own_name = checked_name(adapter.name if name is None else name)
    record = new_record(adapter, own_name, fields, addition.base_model, None if source is adapter else str(source))
    _require_storable(adapter, stored_as)
    if source is adapter:
        # reading has checked every number of an adapter that was read
        require_numbers(adapter.layers, adapter.heads, f"adapter {adapter.name!r},")
    num_bytes = sum(tensor.nbytes for factors in adapter.layers.values() for tensor in factors.tensors().values())
    return Prepared(adapter, record, num_bytes=num_bytes)


def _require_storable(adapter: Adapter, stored_as: str) -> None:
    """Raise AdapterCorrupt for factors that do not fit, AdapterUnsupported for no effect or no form in `stored_as`."""
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
    """Return the adapter's record, as version 1 of `name`. Raises AdapterUnsupported for a field of wrong type or size."""
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
        target_modules=module_names(adapter.layers),
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
    """Return the fields in `given`, the empty ones filled from the card."""
    fields = {key: given[key] or card.get(key) or given[key] for key in OWN_FIELDS}
    if fields["license"]:
        said = checked_text(name, "license", fields["license"], MAX_LABEL_BYTES)
        fields["license"] = licenses.canonical(said) if given["license"] else licenses.of_card(said, f"adapter {name!r}")
    return fields


def _source(card: Mapping[str, Any], place: str | None) -> Source | None:
    """Return the repository and commit that the reader noted in the card, else `place`; None for an adapter from memory."""
    match card.get("source"):
        case {"repository": str() as repository, "revision": str() as revision} if place in (None, repository):
            return Source(repository, revision)
        case {"repository": str() as repository} if place in (None, repository):
            return Source(repository, None)
    return None if place is None else Source(without_secrets(place))


def checked_policy(policy: str | Mapping[str, str]) -> dict[str, str]:
    """Return {kind of anomaly: policy} of one policy for all kinds, or of a mapping whose missing kinds are "report"."""
    policies = dict.fromkeys(KINDS, policy) if isinstance(policy, str) else {**dict.fromkeys(KINDS, "report"), **policy}
    for kind, chosen in policies.items():
        if kind not in KINDS or chosen not in POLICIES:
            raise AdapterUnsupported(
                f"anomalies={policy!r} is not a policy; give one of {', '.join(POLICIES)}, or a mapping to them from "
                f"{', '.join(KINDS)}"
            )
    return policies


def examine(
    catalogue: CatalogueStore, blobs: BlobStore, prepared: Prepared, policy: str | Mapping[str, str], model: Any = None
) -> Prepared:
    """Return the adapter with the anomalies that examiners found, in quarantine if the policy says so.

    It is not examined if the policy is "off" for every kind, or if the content is stored under the name already. Raises
    AdapterSuspicious if the policy refuses an anomaly, AdapterUnsupported for an unknown policy, and for one that needs an
    examiner if there is none.
    """
    policies = checked_policy(policy)
    if set(policies.values()) - {"off", "report"} and not examiners():
        raise AdapterUnsupported(f"anomalies={policy!r}: nothing installed here looks for anomalies (docs/anomalies.md)")
    with catalogue.reading() as connection:
        existing = rows.find(connection, prepared.record.name)
    if set(policies.values()) == {"off"} or (existing is not None and existing.record.hash == prepared.record.hash):
        return replace(prepared, figures=None)
    for examiner in examiners():
        prepared = examiner.examine(catalogue, blobs, prepared, policies, model)
    return prepared


def examiners() -> list[Any]:
    """Return the entries of the registry `examiners`, which look for anomalies by `measure` and `examine`."""
    return [registry.get("examiners", name) for name in registry.names("examiners")]


def layouts() -> list[Any]:
    """Return the modules `router_files` of extensions, each of which reads some layouts of saved routers."""
    return list(registry.bringing("router_files"))


def layout_of(folder: Path) -> Any | None:
    """Return the module of `layouts()` that reads the router in a folder, or None."""
    return next((layout for layout in layouts() if layout.is_router(folder)), None)


def keep_mixture(hub: CompositionShelf, addition: Addition, *, replace: bool, model: Any) -> StoredComposition | None:
    """Store the mixture of adapters in a folder as a composition, and return it; None for any other source.

    It is opened for the base `model`, if given. Raises HubError for fields that a composition lacks, and errors of saving.
    """
    if not isinstance(addition.source, str | Path) or not (folder := Path(addition.source)).is_dir():
        return None
    if (layout := layout_of(folder)) is None or not layout.is_mixture(folder):
        return None
    if fields := [name for name in (*OWN_FIELDS, "base_model") if getattr(addition, name)]:
        raise HubError(
            f"{folder} is a mixture of adapters, kept as a composition, which has no {fields[0]}: leave it out, or add the "
            "adapters in it by their own paths"
        )
    name = name_of(folder.absolute()) if addition.name is None else addition.name
    return hub.save_composition(name, layout.read(folder, None, model), replace=replace)
