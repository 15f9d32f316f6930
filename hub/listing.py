"""A hub's catalogue, read: records, vectors and the log of changes. No adapter is opened, and torch is not needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from loraweave.common.names import checked_name, near_misses
from loraweave.errors import AdapterNotFound, InvalidName
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.protocols import CatalogueStore, Connection, VectorSearch
from loraweave.hub.tables import rows, versions
from loraweave.hub.tables.filtering import Filters, bases, matching
from loraweave.hub.tables.vectors import Changes, read_changes, read_vectors, write_vectors
from loraweave.types import BaseKey, Candidate, Record

if TYPE_CHECKING:
    import numpy as np


T = TypeVar("T")


class Listing:
    """A hub's catalogue for reading, which also stores the vectors of searches. `Hub` adds blobs and writing.

    `path` is the folder of the hub on this machine.
    """

    def __init__(self, path: Path, catalogue: CatalogueStore) -> None:
        self.path = path
        self._catalogue = catalogue
        self._kept: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Return the object that `make` makes, made once and kept under this name with the hub, such as a searcher."""
        if name not in self._kept:
            self._kept[name] = make()
        instance: T = self._kept[name]
        return instance

    def __contains__(self, name: object) -> bool:
        try:
            checked = checked_name(name)
        except InvalidName:
            return False
        with self._catalogue.reading() as connection:
            return rows.find(connection, checked) is not None

    def __len__(self) -> int:
        """Return the number of adapters that are not in quarantine."""
        with self._catalogue.reading() as connection:
            (num_adapters,) = state_row(connection, "num_adapters", self._catalogue.where)
            return int(num_adapters) - rows.num_quarantined(connection)

    def __iter__(self) -> Iterator[Record]:
        """Return an iterator of the current records, in order of addition."""
        return iter(self.records())

    def records(
        self,
        *,
        base_model: str | BaseKey | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        quarantined: bool = False,
    ) -> list[Record]:
        """Return the records for the base model, under one of the licenses and with all the tags, in order of addition.

        A base model is an id, or the key of a loaded model (`base_key`), which tells namesakes apart and finds the same
        weights under another id. Licenses are SPDX expressions or ids of the model hub; "MIT OR GPL-3.0-only" is also found
        for MIT. Adapters in quarantine are left out; with `quarantined`, they alone are listed.
        """
        filters = Filters(base_model, license, tags)
        with self._catalogue.reading() as connection:
            if quarantined:
                held = [row.record for row in rows.stored_rows(connection, rows.quarantined_seqs(connection))]
                return [record for record in held if filters.passes(record)]
            if filters.pass_all:
                return [row.record for row in rows.every(connection) if not row.record.quarantined]
            return [row.record for row in rows.stored_rows(connection, matching(connection, filters))]

    def bases(self) -> list[tuple[Record, int]]:
        """Return the record of the first adapter of each different base model, and the number of its adapters."""
        with self._catalogue.reading() as connection:
            return bases(connection)

    def record(self, name: str) -> Record:
        """Return the adapter's record. Raises AdapterNotFound, with near misses."""
        return self._row(name).record

    def history(self, name: str) -> list[Record]:
        """Return the record of every version of the adapter, oldest first; the last one is that of `hub[name]`."""
        with self._catalogue.reading() as connection:
            row = self._require_row(connection, name)
            return [*(old.record for old in versions.superseded(connection, row)), row.record]

    @property
    def generation(self) -> int:
        """The number that every committed change raises, so that an index can tell whether it is stale."""
        with self._catalogue.reading() as connection:
            return int(state_row(connection, "generation", self._catalogue.where)[0])

    @property
    def writable(self) -> bool:
        """True if the hub can be written; reading works either way."""
        return self._catalogue.writable

    def changes(self, embedder_id: str, *, since: int = 0, after: int = 0, limit: int = 256) -> Changes:
        """Return the first `limit` adapters above seq `after` changed after generation `since`; 0 gives all.

        Pages are small, since the time that Python's collector takes grows with the rows that are alive.
        """
        with self._catalogue.reading() as connection:
            where = self._catalogue.where
            return read_changes(connection, embedder_id, since=since, after=after, limit=limit, where=where)

    def records_at(self, seqs: Sequence[int]) -> dict[int, Record]:
        """Map each of these adapter numbers to its record, in order of addition; removed adapters are left out."""
        with self._catalogue.reading() as connection:
            return {row.seq: row.record for row in rows.stored_rows(connection, seqs)}

    def seqs(self, filters: Filters) -> list[int]:
        """Return the numbers of adapters that pass and are not in quarantine, in order of addition; reads no records."""
        with self._catalogue.reading() as connection:
            return matching(connection, filters)

    def vectors(self, embedder_id: str) -> dict[str, tuple[str, np.ndarray]]:
        """Map each adapter's name to (digest of the embedded text, fp32 vector), in order of addition."""
        with self._catalogue.reading() as connection:
            return read_vectors(connection, embedder_id)

    def store_vectors(self, embedder_id: str, rows: Sequence[tuple[str, str, np.ndarray]]) -> None:
        """Store (name, digest of the text, vector) rows in one transaction, except for names removed meanwhile.

        A vector is removed and renamed with its adapter. Raises DimensionMismatch for several sizes and values not finite.
        """
        with self._catalogue.writing(f"storing vectors of embedder {embedder_id!r}") as connection:
            write_vectors(connection, embedder_id, rows)

    @property
    def vector_search(self) -> VectorSearch | None:
        """The search in the database itself; None for a hub in a folder, whose searches read all vectors."""
        return self._catalogue.vector_search

    def close(self) -> None:
        """Close the catalogue. Adapters that were read stay usable."""
        self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._catalogue.where!r})"

    def _row(self, name: str, version: int | None = None) -> rows.Row:
        with self._catalogue.reading() as connection:
            row = self._require_row(connection, name)
            return row if version is None else versions.chosen(connection, row, version)

    def _require_row(self, connection: Connection, name: str) -> rows.Row:
        """Return the row with that name. Raises AdapterNotFound, with near misses."""
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


class Candidates(list[Candidate]):
    """Candidates of a search, best first, and the hub that has their adapters."""

    def __init__(self, candidates: Iterable[Candidate], hub: Listing) -> None:
        super().__init__(candidates)
        self.hub = hub

    def __reduce__(self) -> tuple[type[list[Candidate]], tuple[list[Candidate]]]:
        # pickled without the hub, whose files are open in this process
        return list, (list(self),)

    def _repr_html_(self) -> str:
        from loraweave.common.display import ShownTable

        rows = [(candidate.name, candidate.score, candidate.evidence) for candidate in self]
        return ShownTable.of(("adapter", "score", "evidence"), rows)._repr_html_()
