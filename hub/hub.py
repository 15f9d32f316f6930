"""The hub: adapters on disk, under names, with the records and vectors that a search reads.

SQLite rows are the catalogue, safetensors files the blobs. A blob is complete and on disk before its row is committed, so an
interrupted call leaves at most a file that no row names.

This module and its imports at the top do not import torch: the command line lists a hub in a fraction of torch's start.
Functions that need tensors therefore import them themselves, the accepted exception to the rule about imports in functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.common.files import storage_errors
from loraweave.common.names import checked_name
from loraweave.common.process import paused_collector
from loraweave.common.rows import GivenRows
from loraweave.errors import AdapterExists, AdapterNotFound, HubCorrupt, HubError, HubFull
from loraweave.hub.compositions import CompositionShelf, StoredComposition
from loraweave.hub.licenses import canonical
from loraweave.hub.listing import Candidates
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.folder_blobs import STALE_TMP_S, digests
from loraweave.hub.stores.open_stores import open_stores
from loraweave.hub.tables import filtering, rows, versions
from loraweave.hub.tables.fields import card_with_outputs, checked_fields, split_pairs
from loraweave.hub.tables.filtering import Filters
from loraweave.types import BaseKey, Candidate, Record

if TYPE_CHECKING:
    from torch import nn

    from loraweave.hub.adapter import Adapter
    from loraweave.hub.adding import Added, Addition
    from loraweave.hub.pool import ExpertPool
    from loraweave.hub.sources import Repository
    from loraweave.hub.stores.verify import Check, Verification

# the number of rows shown of a hub in a notebook
SHOWN = 20


class Hub(CompositionShelf):
    """A hub in a folder or at `postgresql://...`, created unless it exists. Processes and threads may use it at once.

    `blobs` is a folder or the URL of a store that fsspec reaches (s3://bucket/prefix); by default the hub's own folder.
    Writers wait up to `timeout_s` seconds for each other (HubLocked); readers never wait. A place that cannot be written is
    opened for reading, and writing raises HubReadOnly. Raises HubCorrupt for a catalogue that is damaged or too new. `path`
    is the folder of the hub on this machine, in the cache when its catalogue is elsewhere.
    """

    def __init__(self, path: str | Path, *, blobs: str | Path | None = None, timeout_s: float = 30.0) -> None:
        folder, catalogue, self._blobs = open_stores(path, blobs, timeout_s)
        super().__init__(folder, catalogue)
        # the arguments by which another process opens it
        self._address = _absolute(path), None if blobs is None else _absolute(blobs)
        try:
            if self._catalogue.writable:
                with storage_errors(self._catalogue.where, "opening the hub"):
                    self._blobs.sweep(STALE_TMP_S)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        # a hub is pickled as its address; a process opens each once
        return _opened, self._address

    def add(
        self,
        source: str | Path | Adapter | Repository,
        *,
        name: str | None = None,
        description: str = "",
        examples: GivenRows = (),
        tags: Collection[str] = (),
        license: str | None = None,
        base_model: str | None = None,
        stored_as: str = "factors",
        allow_pickle: bool = False,
        language: Collection[str] | str = (),
        replace: bool = False,
        anomalies: str | Mapping[str, str] = "report",
        model: nn.Module | None = None,
    ) -> Record | StoredComposition:
        """Store an adapter, folder, file or model hub repository; fields not given come from the adapter and its card.

        The folder of a mixture that an extension opens (docs/extensions/routers.md) is stored with its adapters, by
        `save_composition`. If the name has the same content already, its record is returned as it is, and a damaged blob
        is replaced. `stored_as="compeft"` stores the ternary factors that `compeft` makes in 0.3 to 1.5 bits an entry, bit
        for bit; content that is stored already stays in the form it has. `allow_pickle` permits reading adapter_model.bin.
        `examples` are sample inputs, or rows with outputs too (`loraweave.common.rows`), which tell tasks of the same inputs
        apart (`Retriever.for_examples`); raises InvalidTask for anything else.

        With `replace=True` other content under the name becomes its next version, and fields that neither the caller nor the
        card gives stay as they were. Raises AdapterExists for other content without it; InvalidName; AdapterCorrupt for
        factors that are not finite or do not fit; AdapterUnsupported for an adapter without effect, above a limit, or not
        ternary for "compeft". All is checked before anything is written.

        Anomalies beside the hub's other adapters (docs/anomalies.md), or beside the weights of `model`, are listed in the
        record's `anomalies`. The policy `anomalies="quarantine"` sets such an adapter aside until `release`, "refuse" raises
        AdapterSuspicious, "off" does not look, and a mapping chooses by kind.
        """
        from loraweave.hub.adding import Addition, examine, keep_mixture, prepare
        from loraweave.hub.stores.storing import store

        addition = Addition(source, name, description, examples, tags, license, base_model, language)
        if (kept := keep_mixture(self, addition, replace=replace, model=model)) is not None:
            return kept
        prepared = prepare(addition, stored_as=stored_as, allow_pickle=allow_pickle)
        batch = [examine(self._catalogue, self._blobs, prepared, anomalies, model)]
        ((stored, refused),) = store(self._catalogue, self._blobs, batch, stored_as=stored_as, as_version=replace)
        if refused is not None:
            raise refused
        return stored

    def add_many(
        self,
        sources: Iterable[str | Path | Adapter | Repository | Addition],
        *,
        stored_as: str = "factors",
        allow_pickle: bool = False,
        replace: bool = False,
        anomalies: str | Mapping[str, str] = "report",
        n_jobs: int | None = None,
        progress: bool = False,
    ) -> Added:
        """Add many adapters as `add` does, with fewer waits for the disk; return the stored `.records` and the `.refused`.

        Batches of up to 256 adapters are stored as a whole or not at all, and adapters of one batch are not compared with
        each other for anomalies. After an interruption the same call goes on: stored adapters are only read. `progress`
        shows a bar on the terminal.

        `n_jobs` workers, or those that `joblib.parallel_config` names, read and check a list of folders, files and
        repositories, and write their content into the store; this process writes the rows, in the order of the list
        (docs/howto/many_machines.md). A source whose workers die is in `.refused`.
        """
        from loraweave.hub.adding import add_many

        settings: dict[str, Any] = {"stored_as": stored_as, "allow_pickle": allow_pickle, "replace": replace}
        return add_many(self, sources, **settings, anomalies=anomalies, progress=progress, n_jobs=n_jobs)

    def __getitem__(self, name: str) -> Adapter:
        """Return the adapter, mapped from its blob. Raises AdapterNotFound, with near misses, or AdapterCorrupt."""
        return self.get(name)

    def get(self, name: str, *, version: int | None = None, quarantined: bool = False) -> Adapter:
        """Return the adapter in that version, by default the newest. Raises AdapterNotFound, listing the versions.

        Raises AdapterQuarantined if the adapter is in quarantine, unless `quarantined` permits it.
        """
        from loraweave.hub.stores.blobs import stored_adapter

        failed = None
        while True:
            row = self._row(name, version)
            if row.record.quarantined and not quarantined:
                raise rows.in_quarantine(row.record)
            try:
                return stored_adapter(self._blobs, row)
            except HubError:
                # a blob may be collected before it is mapped, and the row has another by then, or is gone
                if row == failed:
                    raise
                failed = row

    def rollback(self, name: str, version: int) -> Record:
        """Add a new version with the content and fields of an earlier one; return its record. The history stays whole."""
        with self._catalogue.writing(f"rolling back adapter {name!r}") as connection:
            return versions.restore(connection, self._require_row(connection, name), version)

    def prune(self, name: str, *, keep: int = 1) -> int:
        """Forget all versions but the newest `keep`, and return how many were forgotten. gc() then frees unneeded blobs."""
        with self._catalogue.writing(f"pruning the versions of adapter {name!r}") as connection:
            return versions.prune(connection, self._require_row(connection, name), keep)

    def pool(self, names: Iterable[str] | None = None, *, lazy: bool = False) -> ExpertPool:
        """Return the named adapters as experts, in the order given; without names all, in order of addition.

        With `lazy` no adapter is opened before it is used, so that a pool may be larger than memory. Each expert is pinned
        to its present version: its first use raises AdapterNotFound if it has been removed or has other content by then.
        """
        from loraweave.hub.pool import ExpertPool

        if lazy:
            listed = self.records() if names is None else [self.record(name) for name in names]
            pinned = {record.name: (record.version, record.hash) for record in listed}
            names = [record.name for record in listed]
            return ExpertPool.on_demand(names, lambda name: self._get_pinned(name, *pinned[name]))
        chosen = [record.name for record in self.records()] if names is None else list(names)
        with paused_collector():
            return ExpertPool(map(self.get, chosen))

    def search(
        self,
        query: str,
        *,
        k: int = 5,
        base_model: str | BaseKey | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
    ) -> list[Candidate]:
        """Return the k adapters whose texts fit the query best, with scores and evidence; [] if none reaches `min_score`.

        Only adapters for the base, under one of the licenses and with all of the tags are compared. The list has this hub as
        its `hub`, so that it can be the pool of `lw.experts`.
        """
        from loraweave.hub.search.search import search

        filters = Filters(base_model, license, tags)
        return Candidates(search(self, query, k=k, filters=filters, min_score=min_score), self)

    def similar(self, name: str, *, k: int = 5) -> list[Candidate]:
        """Return the k adapters whose updates have the largest cosine with this one's; ties by order of addition.

        Only adapters that share a layer are compared. A damaged one is left out with a warning. Raises RetrievalError unless
        k is a whole number of 0 or more.
        """
        from loraweave.hub.search.search import most_similar

        return Candidates(most_similar(self[name], self.records(), self.get, k), self)

    def update(
        self,
        name: str,
        *,
        description: str | None = None,
        examples: GivenRows | None = None,
        tags: Collection[str] | None = None,
        license: str | None = None,
        language: Collection[str] | str | None = None,
    ) -> Record:
        """Replace the given fields of an adapter; an empty value clears a field (license=""). The version stays the same.

        New `examples` drop the outputs stored beside the old sample inputs.
        """
        changes = {"description": description, "examples": examples, "tags": tags, "license": license, "language": language}
        changes["license"] = canonical(license) if license else license
        with self._catalogue.writing(f"updating adapter {name!r}") as connection:
            row = self._require_row(connection, name)
            old = {key: getattr(row.record, key) for key in changes}
            inputs, outputs = (None, []) if examples is None else split_pairs(row.record.name, examples)
            changes["examples"] = inputs
            fields = checked_fields(row.record.name, {key: old[key] if new is None else new for key, new in changes.items()})
            card = card_with_outputs(row.record.card, row.record.examples, fields.examples, outputs)
            return rows.change(connection, row, replace(row.record, card=card, **vars(fields)))

    def bind(self, name: str, model: Any) -> Record:
        """Check that the adapter fits the base model or pipeline, and store the model's revision and fingerprint with it.

        Raises BaseModelMismatch if the adapter was made for another model, LayerMismatch if a layer does not fit.
        """
        from loraweave.hub.stores.blobs import stored_adapter
        from loraweave.hub.stores.storing import bound_record

        with self._catalogue.writing(f"binding adapter {name!r} to a base model") as connection:
            row = self._require_row(connection, name)
            record = bound_record(row.record, stored_adapter(self._blobs, row), model)
            filtering.remember(connection, record)
            return rows.change(connection, row, record)

    def quarantine(self, name: str) -> Record:
        """Put the adapter in quarantine: it stays stored under its name, but nothing finds or reads it until `release`."""
        with self._catalogue.writing(f"putting adapter {name!r} in quarantine") as connection:
            row = self._require_row(connection, name)
            return rows.change(connection, row, replace(row.record, quarantined=True))

    def release(self, name: str) -> Record:
        """Take the adapter out of quarantine. Its anomalies stay in its record."""
        with self._catalogue.writing(f"releasing adapter {name!r}") as connection:
            row = self._require_row(connection, name)
            return rows.change(connection, row, replace(row.record, quarantined=False))

    def rename(self, old: str, new: str) -> Record:
        """Rename the adapter; return its record. Raises AdapterExists if `new` is taken, InvalidName if it is invalid."""
        target = checked_name(new)
        with self._catalogue.writing(f"renaming adapter {old!r}") as connection:
            row = self._require_row(connection, old)
            taken = rows.find(connection, target)
            if taken is not None and taken.seq != row.seq:
                raise AdapterExists(
                    f"renaming adapter {row.record.name!r} (hash {row.record.hash}): the name {target!r} stands for "
                    f"another one (hash {taken.record.hash}); hub.remove({target!r}) first, or choose another name"
                )
            return rows.change(connection, row, replace(row.record, name=target))

    def remove(self, name: str) -> None:
        """Remove the adapter and all its versions from the catalogue.

        The blobs stay until gc(), so adapters that are mapped from them stay usable.
        """
        with self._catalogue.writing(f"removing adapter {name!r}") as connection:
            row = self._require_row(connection, name)
            versions.forget(connection, row)
            rows.delete(connection, row)

    def annotate(self, key: str, value: Callable[[Record], Any], names: Iterable[str] | None = None) -> list[Record]:
        """Put value(record) under `key` into the cards of adapters, all by default; return their new records.

        The version stays the same. Use a key of your own, not one that the hub reads. Raises AdapterNotFound for an unknown
        name; then nothing has changed.
        """
        with self._catalogue.writing(f"writing {key!r} into cards") as connection:
            chosen = rows.every(connection) if names is None else [self._require_row(connection, name) for name in names]
            changed = [(row, {**row.record.card, key: value(row.record)}) for row in chosen]
            return [rows.change(connection, row, replace(row.record, card=card)) for row, card in changed]

    def verify(self, *, also: Check | None = None, n_jobs: int | None = None) -> Verification:
        """Read every row and every blob and report the damage: `.ok`, `.problems`, `.intact`, `.orphans`.

        `also` takes the records of all adapters and returns a sentence for each problem; entries of the registry `checks`
        make such functions. `n_jobs` workers, or those that `joblib.parallel_config` names, read the blobs
        (docs/howto/many_machines.md).
        """
        from loraweave.hub.search import keys
        from loraweave.hub.stores.verify import verify

        return verify(self, partial(keys.problems, self.path), also, n_jobs)

    def gc(self) -> int:
        """Delete blobs that no adapter version or composition needs, and killed writers' leftovers; return the bytes freed.

        Raises HubCorrupt, with nothing deleted, if a row is damaged or missing: a blob might belong to it.
        """
        doing = "collecting unused blobs"
        with self._catalogue.locked(doing):
            records = self._all_versions(doing)
            named = {record.hash for record in records} | digests(records) | self._composition_digests(doing)
            with storage_errors(self._catalogue.where, doing):
                # under the lock every temporary file is a dead writer's
                freed = self._blobs.sweep(older_than_s=0.0)
                for content_hash in self._blobs.names():
                    if content_hash not in named:
                        freed += self._blobs.remove(content_hash)
            # files first: a full disk lets the catalogue be written only once they are gone; a row without its blob does no
            # harm, so that the next call may delete it
            with suppress(HubFull), self._catalogue.transaction(doing) as connection:
                filtering.tidy(connection, records)
                connection.execute(
                    "DELETE FROM blobs WHERE hash NOT IN (SELECT hash FROM adapters UNION SELECT hash FROM versions)"
                )
            self._catalogue.empty_log()
        return freed

    def _all_versions(self, doing: str) -> list[Record]:
        """Return the records of all versions of all adapters. Raises HubCorrupt if one is damaged or missing."""
        with self._catalogue.reading() as connection:
            newest = [row.record for row in rows.every(connection)]
            older = [old.record for key in versions.every(connection) if (old := versions.at(connection, *key))]
            counted = state_row(connection, "num_adapters, num_versions", self._catalogue.where)
        kinds = ("adapters", newest, counted[0]), ("superseded versions", older, counted[1])
        for what, listed, num_added in kinds:
            if len(listed) != num_added:
                raise HubCorrupt(
                    f"{doing}: the catalogue has the rows of {len(listed)} {what}, but {num_added} were added; nothing was "
                    "deleted, and Hub.verify() lists what can still be read"
                )
        return [*newest, *older]

    def _repr_html_(self) -> str:
        from loraweave.common.display import ShownTable

        seqs = self.seqs(Filters())
        records = self.records_at(seqs[:SHOWN]).values()
        title = f"{self!r}: {len(seqs):,} adapters" + (f", the first {SHOWN}" if len(seqs) > SHOWN else "")
        listed = [(r.name, r.rank, r.base_model, r.license or "", ", ".join(r.tags), r.description) for r in records]
        columns = ("name", "rank", "base model", "license", "tags", "description")
        return ShownTable.of(columns, listed, title=title)._repr_html_()

    def _get_pinned(self, name: str, version: int, content_hash: str) -> Adapter:
        """Return this version of the adapter. Raises AdapterNotFound if its content has changed, as after remove and add."""
        adapter = self.get(name, version=version)
        if adapter.hash != content_hash:
            raise AdapterNotFound(
                f"version {version} of adapter {name!r} had the hash {content_hash[:12]} when the pool was made, and has "
                f"{adapter.hash[:12]} now; make the pool again"
            )
        return adapter


def _absolute(place: str | Path) -> str:
    return str(place) if "://" in str(place) else str(Path(place).absolute())


@lru_cache(maxsize=8)
def _opened(path: str, blobs: str | None) -> Hub:
    return Hub(path, blobs=blobs)
