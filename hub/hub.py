"""The hub: adapters on disk, under names, with what a search reads.

SQLite rows are the catalogue, safetensors files the blobs. A blob is complete and on disk before its row is committed, so an
interrupted call leaves at most a file that no row names.

This module and what it imports at its top do without torch: the command line lists a hub in a fraction of torch's start.
Functions that need tensors therefore import them themselves, the accepted exception to the rule about imports in functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from loraweave.common.names import checked_name, near_misses
from loraweave.common.process import paused_collector
from loraweave.common.rows import GivenRows
from loraweave.errors import AdapterExists, AdapterNotFound, HubError, InvalidName
from loraweave.hub import quarantine
from loraweave.hub.intake.fields import card_with_outputs, checked_fields, split_pairs
from loraweave.hub.intake.licenses import canonical
from loraweave.hub.search.search import Found, html_of_hub
from loraweave.hub.stores.catalogue import require_row
from loraweave.hub.stores.collect import collect
from loraweave.hub.stores.errors import storage_errors
from loraweave.hub.stores.folder_blobs import STALE_TMP_S
from loraweave.hub.stores.open_stores import open_stores
from loraweave.hub.stores.protocols import Connection, VectorSearch
from loraweave.hub.tables import filtering, rows, versions
from loraweave.hub.tables.changes import Changes, read_changes
from loraweave.hub.tables.filtering import Filters, bases, matching
from loraweave.hub.tables.vectors import read_vectors, write_vectors
from loraweave.types import BaseKey, Candidate, Record

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from loraweave.hub.adapter import Adapter
    from loraweave.hub.health.verify import Verification
    from loraweave.hub.intake.adding import Added, Addition
    from loraweave.hub.pool import ExpertPool


class Hub:
    """Opens the hub in a folder or at `postgresql://...`, or creates it. Several processes and threads may use it at once.

    `blobs` is a folder or the URL of a store that fsspec reaches (s3://bucket/prefix); by default the hub's own folder.
    Writers wait up to `timeout_s` seconds for each other (HubLocked); readers never wait. A place that cannot be written is
    opened for reading, and writing raises HubReadOnly. HubCorrupt for a catalogue that is damaged or too new. `path` is the
    folder of the hub on this machine, in the cache when its catalogue is elsewhere.
    """

    def __init__(self, path: str | Path, *, blobs: str | Path | None = None, timeout_s: float = 30.0) -> None:
        self.path, self._catalogue, self._blobs = open_stores(path, blobs, timeout_s)
        try:
            if self._catalogue.writable:
                with storage_errors(self._catalogue.where, "opening the hub"):
                    self._blobs.sweep(STALE_TMP_S)
        except BaseException:
            self.close()
            raise

    def add(
        self,
        source: str | Path | Adapter,
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
    ) -> Record:
        """Stores an adapter, folder, archive or model hub repository; what is not given comes from the adapter and its card.

        The same content under the same name is there already: its record is returned as it is, and a damaged blob is
        replaced. `stored_as="compeft"` keeps the ternary factors that `compeft` makes in 0.3 to 1.5 bits an entry, bit for
        bit; content that is stored already stays in the form it has. `allow_pickle` has an adapter_model.bin read.
        `examples` are sample inputs, or rows with outputs too (`loraweave.common.rows`), which tell tasks of the same inputs
        apart (`Retriever.for_examples`); InvalidTask for anything else.

        With `replace=True` other content under the name becomes its next version, and fields that neither the caller nor the
        card gives stay as they were. AdapterExists for other content without it; InvalidName; AdapterCorrupt for factors
        that are not finite or do not fit; AdapterUnsupported for an adapter without effect, above a limit, or not ternary
        for that form. All is checked before anything is written.

        What looks wrong beside the hub's other adapters (docs/anomalies.md), or beside the weights of `model`, is in the
        record's `anomalies`; with the policy `anomalies="quarantine"` the adapter is put aside until `release`, "refuse"
        raises AdapterSuspicious, "off" does not look, and a mapping chooses by kind.
        """
        from loraweave.hub.health.anomalies import examined
        from loraweave.hub.intake.adding import Addition, prepared
        from loraweave.hub.stores.storing import store

        addition = Addition(source, name, description, examples, tags, license, base_model, language)
        adapter, record = prepared(addition, stored_as=stored_as, allow_pickle=allow_pickle)
        record, figures = examined(self._catalogue, self._blobs, adapter, record, anomalies, model)
        return store(self._catalogue, self._blobs, adapter, record, stored_as=stored_as, as_version=replace, figures=figures)

    def add_many(
        self,
        sources: Iterable[str | Path | Adapter | Addition],
        *,
        stored_as: str = "factors",
        allow_pickle: bool = False,
        replace: bool = False,
        anomalies: str | Mapping[str, str] = "report",
        progress: bool = False,
    ) -> Added:
        """Adds many as `add` does, in fewer waits for the disk: `.records` has those that are there now, `.refused` why not.

        A batch of up to 256 is there whole or not at all; those in it are not compared with each other for anomalies. Called
        again after an interruption with the same sources it goes on: what is there already is only read. `progress` shows a
        bar on the terminal.
        """
        from loraweave.hub.intake.adding import add_many

        return add_many(
            self._catalogue,
            self._blobs,
            sources,
            stored_as=stored_as,
            allow_pickle=allow_pickle,
            replace=replace,
            anomalies=anomalies,
            progress=progress,
        )

    def __getitem__(self, name: str) -> Adapter:
        """The adapter, its tensors mapped from the blob. AdapterNotFound names near misses; AdapterCorrupt for damage."""
        return self.get(name)

    def get(self, name: str, *, version: int | None = None, quarantined: bool = False) -> Adapter:
        """The adapter as it was in that version, by default the newest. AdapterNotFound names the versions there are.

        AdapterQuarantined for one in quarantine, unless `quarantined` says that this is known.
        """

        def find() -> rows.Row:
            row = self._row(name) if version is None else self._version(name, version)
            if not quarantined:
                quarantine.require_released(row.record)
            return row

        return self._opened(find)

    def history(self, name: str) -> list[Record]:
        """The record of every version of the adapter, oldest first; the last one is what `hub[name]` gives."""
        with self._catalogue.reading() as connection:
            row = self._found(connection, name)
            return [*(old.record for old in versions.superseded(connection, row)), row.record]

    def rollback(self, name: str, version: int) -> Record:
        """Makes an earlier version's content and fields the newest again, as a version of its own: history stays whole."""
        with self._catalogue.writing(f"rolling back adapter {name!r}") as connection:
            return versions.restore(connection, self._found(connection, name), version)

    def prune(self, name: str, *, keep: int = 1) -> int:
        """Forgets all but the newest `keep` versions; returns how many. gc() then frees what no version needs."""
        with self._catalogue.writing(f"pruning the versions of adapter {name!r}") as connection:
            return versions.prune(connection, self._found(connection, name), keep)

    def __contains__(self, name: object) -> bool:
        try:
            return self._find(checked_name(name)) is not None
        except InvalidName:
            return False

    def __len__(self) -> int:
        """The number of adapters that are not in quarantine."""
        with self._catalogue.reading() as connection:
            found = connection.execute("SELECT num_adapters FROM state").fetchone()
            return int(require_row(found, self._catalogue.where)[0]) - quarantine.count(connection)

    def __iter__(self) -> Iterator[Record]:
        """The records in order of addition, as of now."""
        return iter(self.records())

    def records(
        self,
        *,
        base_model: str | BaseKey | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        quarantined: bool = False,
    ) -> list[Record]:
        """The records in order of addition that are for the base model, under one of the licenses and with all the tags.

        A base model is an id, or the key of a model at hand (`base_key`), which tells namesakes apart and finds the same
        weights under another id.
        Licenses are SPDX expressions or ids of the model hub; "MIT OR GPL-3.0-only" is found for MIT too. Those in
        quarantine are left out, or with `quarantined` they alone are listed.
        """
        filters = Filters(base_model, license, tags)
        with self._catalogue.reading() as connection:
            if quarantined:
                held = [row.record for row in rows.some(connection, quarantine.seqs(connection))]
                return [record for record in held if filters.passes(record)]
            if filters.pass_all:
                return [row.record for row in rows.every(connection) if not row.record.quarantined]
            return [row.record for row in rows.some(connection, matching(connection, filters))]

    def bases(self) -> list[tuple[Record, int]]:
        """For each different base model the record of its first adapter and the number of its adapters."""
        with self._catalogue.reading() as connection:
            return bases(connection)

    def record(self, name: str) -> Record:
        """The adapter's record. AdapterNotFound names near misses."""
        return self._row(name).record

    def pool(self, names: Iterable[str] | None = None, *, lazy: bool = False) -> ExpertPool:
        """The named adapters as experts, in the order given; all of them, in order of addition, when no names are given.

        With `lazy` no adapter is opened before it is used, so that a pool may be larger than memory. Each expert stays the
        version that it is now: AdapterNotFound on first use for one that is gone by then, or has other content.
        """
        from loraweave.hub.pool import ExpertPool

        if lazy:
            listed = self.records() if names is None else [self.record(name) for name in names]
            pinned = {record.name: (record.version, record.hash) for record in listed}
            return ExpertPool.on_demand([record.name for record in listed], lambda name: self._pinned(name, *pinned[name]))
        chosen = [record.name for record in self.records()] if names is None else list(names)
        with paused_collector():
            return ExpertPool([self[name] for name in chosen])

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
        """The k adapters whose texts fit the query best, with scores and evidence; [] when none reaches `min_score`.

        The list knows this hub as its `hub`, so that it can be the pool of `lw.experts`.
        """
        from loraweave.hub.search.search import search

        found = search(self, query, k=k, base_model=base_model, license=license, tags=tags, min_score=min_score)
        return Found(found, self)

    def similar(self, name: str, *, k: int = 5) -> list[Candidate]:
        """The k adapters whose low-rank updates have the largest cosine with this one's; ties by order of addition.

        Only adapters that share a layer are compared. A damaged one is left out with a warning. RetrievalError for a k
        that does not count.
        """
        from loraweave.hub.search.similar import most_similar

        return Found(most_similar(self, name, k), self)

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
        """Replaces the fields that are given; an empty value clears one (license=""). The version stays the same.

        Outputs that stood beside the sample inputs go with them where `examples` are others.
        """
        given = {"description": description, "examples": examples, "tags": tags, "license": license, "language": language}
        given["license"] = canonical(license) if license else license
        with self._catalogue.writing(f"updating adapter {name!r}") as connection:
            row = self._found(connection, name)
            old = {key: getattr(row.record, key) for key in given}
            inputs, outputs = (None, []) if examples is None else split_pairs(row.record.name, examples)
            given["examples"] = inputs
            fields = checked_fields(row.record.name, {key: old[key] if new is None else new for key, new in given.items()})
            card = card_with_outputs(row.record.card, row.record.examples, fields.examples, outputs)
            return rows.change(connection, row, replace(row.record, card=card, **vars(fields)))

    def bind(self, name: str, model: nn.Module) -> Record:
        """Checks that the adapter fits the base model, and stores the model's revision and fingerprint with it.

        BaseModelMismatch where the adapter was made for another model, LayerMismatch where a layer does not fit.
        """
        from loraweave.hub.stores.storing import bound_record, stored_adapter

        with self._catalogue.writing(f"binding adapter {name!r} to a base model") as connection:
            row = self._found(connection, name)
            record = bound_record(row.record, stored_adapter(self._blobs, row), model)
            filtering.remember(connection, record)
            return rows.change(connection, row, record)

    def quarantine(self, name: str) -> Record:
        """Puts the adapter aside: it stays stored under its name, and nothing finds or reads it until `release`."""
        with self._catalogue.writing(f"putting adapter {name!r} in quarantine") as connection:
            row = self._found(connection, name)
            return rows.change(connection, row, replace(row.record, quarantined=True))

    def release(self, name: str) -> Record:
        """Takes the adapter out of quarantine. What was found about it stays in its record."""
        with self._catalogue.writing(f"releasing adapter {name!r}") as connection:
            row = self._found(connection, name)
            return rows.change(connection, row, replace(row.record, quarantined=False))

    def rename(self, old: str, new: str) -> Record:
        """The record under its new name. AdapterExists when that name is taken, InvalidName when it cannot be stored."""
        target = checked_name(new)
        with self._catalogue.writing(f"renaming adapter {old!r}") as connection:
            row = self._found(connection, old)
            taken = rows.find(connection, target)
            if taken is not None and taken.seq != row.seq:
                raise AdapterExists(
                    f"renaming adapter {row.record.name!r} (hash {row.record.hash}): the name {target!r} stands for "
                    f"another one (hash {taken.record.hash}); hub.remove({target!r}) first, or choose another name"
                )
            return rows.change(connection, row, replace(row.record, name=target))

    def remove(self, name: str) -> None:
        """Takes the adapter and all its versions out of the catalogue.

        The blobs stay until gc(), so what is mapped from them lives on.
        """
        with self._catalogue.writing(f"removing adapter {name!r}") as connection:
            row = self._found(connection, name)
            versions.forget(connection, row)
            rows.delete(connection, row)

    def verify(self) -> Verification:
        """Reads every row and every blob and reports what is damaged: `.ok`, `.problems`, `.intact`, `.orphans`."""
        from loraweave.hub.health.verify import verify

        return verify(self._catalogue, self._blobs, self.path)

    def gc(self) -> int:
        """Deletes blobs that no row names and what killed writers left; returns the bytes freed.

        HubCorrupt, with nothing deleted, when a row is damaged or missing: a blob might be its.
        """
        return collect(self._catalogue, self._blobs)

    @property
    def generation(self) -> int:
        """A number that every committed change raises, so that an index can tell whether it is stale."""
        with self._catalogue.reading() as connection:
            found = connection.execute("SELECT generation FROM state").fetchone()
        return int(require_row(found, self._catalogue.where)[0])

    @property
    def writable(self) -> bool:
        """Whether the hub can be written; reading works either way."""
        return self._catalogue.writable

    def changes(self, embedder_id: str, *, since: int = 0, after: int = 0, limit: int = 4096) -> Changes:
        """The next `limit` adapters above seq `after` that changed later than generation `since`; since 0 it is all."""
        with self._catalogue.reading() as connection:
            return read_changes(connection, embedder_id, since=since, after=after, limit=limit)

    def records_at(self, seqs: Sequence[int]) -> dict[int, Record]:
        """The records of those places in the order of addition that are still taken."""
        with self._catalogue.reading() as connection:
            return {row.seq: row.record for row in rows.some(connection, seqs)}

    def seqs(self, filters: Filters) -> list[int]:
        """The places in the order of addition of those that pass and are not in quarantine; no record of theirs is read."""
        with self._catalogue.reading() as connection:
            return matching(connection, filters)

    def vectors(self, embedder_id: str) -> dict[str, tuple[str, np.ndarray]]:
        """Adapter name -> (digest of the text that was embedded, fp32 vector), in order of addition."""
        with self._catalogue.reading() as connection:
            return read_vectors(connection, embedder_id)

    def store_vectors(self, embedder_id: str, rows: Sequence[tuple[str, str, np.ndarray]]) -> None:
        """Stores (name, digest of the text, vector) rows in one transaction; names removed meanwhile are passed over.

        A vector goes with its adapter, and follows a rename. DimensionMismatch for vectors of several sizes or not finite.
        """
        with self._catalogue.writing(f"storing vectors of embedder {embedder_id!r}") as connection:
            write_vectors(connection, embedder_id, rows)

    @property
    def vector_search(self) -> VectorSearch | None:
        """What ranks the stored vectors in the database itself; None for a hub in a folder, whose searches read them all."""
        return self._catalogue.vector_search

    def close(self) -> None:
        """Closes the catalogue. Adapters that were read stay usable."""
        self._catalogue.close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Hub({self._catalogue.where!r})"

    def _repr_html_(self) -> str:
        return html_of_hub(self)

    def _find(self, name: str) -> rows.Row | None:
        with self._catalogue.reading() as connection:
            return rows.find(connection, name)

    def _row(self, name: str) -> rows.Row:
        with self._catalogue.reading() as connection:
            return self._found(connection, name)

    def _version(self, name: str, version: int) -> rows.Row:
        with self._catalogue.reading() as connection:
            return versions.chosen(connection, self._found(connection, name), version)

    def _pinned(self, name: str, version: int, content_hash: str) -> Adapter:
        """That version, whatever came since. AdapterNotFound for other content under its number, as after remove and add."""

        def find() -> rows.Row:
            row = self._version(name, version)
            quarantine.require_released(row.record)
            if row.record.hash != content_hash:
                raise AdapterNotFound(
                    f"version {version} of adapter {name!r} had the hash {content_hash[:12]} when the pool was made, and "
                    f"has {row.record.hash[:12]} now; make the pool again"
                )
            return row

        return self._opened(find)

    def _opened(self, find: Callable[[], rows.Row]) -> Adapter:
        """The adapter whose row `find` reads; a row whose blob is collected before it is mapped is read anew."""
        from loraweave.hub.stores.storing import stored_adapter

        row = find()
        while True:
            try:
                return stored_adapter(self._blobs, row)
            except HubError:
                # another row has its own blob, and without a row `find` says so: only what stands still is damaged
                found = find()
                if found == row:
                    raise
                row = found

    def _found(self, connection: Connection, name: str) -> rows.Row:
        """The row of that name. AdapterNotFound names near misses."""
        try:
            row = rows.find(connection, checked_name(name))
        except InvalidName as error:
            raise AdapterNotFound(f"no adapter {name!a:.80} in the hub {self._catalogue.where}: {error}") from error
        if row is not None:
            return row
        close = near_misses(name, rows.names_like(connection, name))
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"it has {len(self)} adapters, none of a like name"
        )
        raise AdapterNotFound(f"no adapter {name!r} in the hub {self._catalogue.where}; {hint}")
