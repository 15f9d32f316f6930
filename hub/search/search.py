"""Finding adapters by what they do: an index over their keys, and the reasons for a hit.

The query is the embedding of the input at hand, the score its inner product with a key. The catalogue is the truth: the
index follows its log of changes. An extension may save a large index as a file, which the next process maps.
"""

from __future__ import annotations

import json
import logging
import operator
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loraweave.common.checks import is_number
from loraweave.common.files import cache_folder, unsynced, whole_file
from loraweave.common.names import text_digest
from loraweave.common.process import lock_of
from loraweave.errors import AdapterCorrupt, AdapterNotFound, AdapterQuarantined, HubError, RetrievalError
from loraweave.hub.embedders._embedder import Embedder, embed_checked, embedder_of, excerpt
from loraweave.hub.embedders.sentence import Sentence
from loraweave.hub.indexes import flat
from loraweave.hub.listing import Listing
from loraweave.hub.search.keys import MAX_LATE, Embed, Hits, Keys, Stamp, digest_of, index_files, made_keys, texts_of
from loraweave.hub.stores.open_stores import local_folder
from loraweave.hub.stores.protocols import VectorSearch
from loraweave.hub.tables.filtering import Filters
from loraweave.hub.tables.rows import Said
from loraweave.types import Candidate, Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter

# the number of adapters whose texts stay embedded for the evidence: 50 x 384 x 4 bytes = 77 kB each at most
NUM_EVIDENCE_CACHED = 1024

# a filter is first applied to the 4 k nearest adapters and this many more
_NUM_TRIED = 32

# the number of adapters without a key that are gathered over pages, so that there is work for many workers
_MANY_MISSING = 4096

# the number of records that a snapshot keeps, and that a database is asked for at a time
_MAX_RECORDS = 4096

_logger = logging.getLogger(__name__)

# passes all adapters that are not in quarantine
NO_FILTERS = Filters()


@dataclass(frozen=True, eq=False)
class Hit:
    """A found adapter, its score, and its key."""

    record: Record
    score: float
    key_D: np.ndarray


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """The keys as of one generation of a catalogue; threads can share it. `records` caches records by seq."""

    identity: str
    generation: int
    keys: Keys
    records: dict[int, Record]


class _Missing(NamedTuple):
    """An adapter without a stored key: the texts of the key, their digest, and the array to write the key to."""

    said: Said
    digest: str
    key_D: np.ndarray


def search(
    hub: Listing, query: str, *, k: int = 5, filters: Filters = NO_FILTERS, min_score: float | None = None
) -> list[Candidate]:
    """Return the k adapters of the hub that fit a text best; [] if none reaches `min_score`. See `Hub.search`."""
    if not isinstance(query, str):
        raise RetrievalError(f"the query must be one text, not {type(query).__name__}; Retriever takes several")
    index = _SHARED.get(hub)
    if index is None:
        # through a proxy: the cached index must not keep the hub open after its last user let go of it
        index = _SHARED[hub] = SearchIndex(weakref.proxy(hub))
    checked_threshold(min_score)
    query_QD = index.embed([query])
    hits = index.hits(query_QD, checked_count(k), filters, min_score=min_score)
    return index.explain(query_QD[0], hits[0])


_SHARED: weakref.WeakKeyDictionary[Any, SearchIndex] = weakref.WeakKeyDictionary()


class SearchIndex:
    """The searchable form of a hub. It follows the hub: each search sees what was added, changed or removed before it.

    `embedder` is a name of the registry, a folder that `train_encoder` wrote, or an object with `dim`, `id` and `embed`;
    `index` is a name, or "auto": a database that ranks vectors itself, else the index whose `default_from` the number of
    adapters reaches, or `flat`. Raises UnknownName for other names.
    """

    def __init__(self, hub: Listing, *, embedder: str | Embedder = "sentence", index: str = "auto") -> None:
        self.hub = hub
        self.embedder = embedder_of(embedder)
        # the argument by which a worker opens the embedder
        self._given = embedder
        self._index = index
        self._choice = flat.index_choice(index)
        self._snapshot: _Snapshot | None = None
        self._lock = lock_of(self)
        self._unstored: dict[str, tuple[str, np.ndarray]] = {}
        # the search in the database, which sends only the hits, and the generation for which the database has all keys
        self._database = hub.vector_search if index == "auto" else None
        self._ready: int | None = None
        self._embedded = _own_texts(hub, self.embedder)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors (Q, D) of query texts. Raises RetrievalError for a query that is empty or not text."""
        self.check(texts)
        return embed_checked(self.embedder, tuple(texts))

    def check(self, texts: Sequence[str]) -> None:
        """Raise RetrievalError if a query is not a text or has no visible character."""
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise RetrievalError(f"query {number} of {len(texts)} is {type(text).__name__}, not a text")
            if not text.strip():
                raise RetrievalError(
                    f"query {number} of {len(texts)} is empty ({text[:20]!r}): it says nothing about a task; "
                    "search by an example input or a description of the task"
                )

    def hits(
        self, query_QD: np.ndarray, k: int, filters: Filters = NO_FILTERS, *, min_score: float | None = None
    ) -> list[list[Hit]]:
        """Return for each query the k best adapters that pass the filters: scores descending, ties in order of addition."""
        checked_threshold(min_score)
        ranked = None
        if self._database is not None and k and len(self.hub):
            ranked = self._near(self._database, query_QD, k, None if filters.pass_all else self.hub.seqs(filters))
        if ranked is None:
            snapshot = self._update()
            if not len(snapshot.keys):
                _logger.info(
                    "the hub is empty, so nothing is found: hub.add(folder, description=..., examples=[...]) fills it"
                )
            if not len(snapshot.keys) or not k:
                return [[] for _ in query_QD]
            if filters.pass_all:
                ranked = self._hits(snapshot, snapshot.keys.search(query_QD, k))
            else:
                ranked = self._filter(snapshot, query_QD, k, filters)
        return ranked if min_score is None else [[hit for hit in hits if hit.score >= min_score] for hits in ranked]

    def explain(self, query_D: np.ndarray, hits: Sequence[Hit], *, evidence: bool = True) -> list[Candidate]:
        """Return the hits as candidates, with the adapter's own text nearest to the query as evidence, if wanted."""
        texts = [self._evidence(query_D, hit.record) if evidence else "" for hit in hits]
        return [Candidate(hit.record.name, hit.score, text, hit.record) for hit, text in zip(hits, texts, strict=True)]

    def samples(self, record: Record) -> np.ndarray:
        """Return the embedded sample inputs of the record (M, D), which its key and its evidence share."""
        kinds, texts = zip(*texts_of(record), strict=True)
        samples_MD: np.ndarray = self._embedded(texts)[np.array(kinds) == "sample input"]
        return samples_MD

    def _near(
        self, database: VectorSearch, query_QD: np.ndarray, k: int, seqs: Sequence[int] | None
    ) -> list[list[Hit]] | None:
        """Return each query's k best hits as the database ranks them, among the adapters `seqs` unless that is None.

        Returns None if this process must rank the adapters instead: a vector cannot be stored, is damaged, or was made by
        another release.
        """
        try:
            # read before the rows: a write in between makes the next search look again, never the reverse
            generation = self.hub.generation
            while generation != self._ready and (records := database.unready(self.embedder.id, _MAX_RECORDS)):
                _logger.info("embedding %d adapters with %s", len(records), self.embedder.id)
                for part, made in made_keys(self._embedded, self._given, records):
                    stored = [(record.name, digest_of(record), key_D) for record, key_D in zip(part, made, strict=True)]
                    self.hub.store_vectors(self.embedder.id, stored)
                generation = self.hub.generation
            self._ready = generation
        except HubError as error:
            # searching only reads: a hub that is read-only, full or locked still answers
            _logger.info("the embeddings cannot be stored, so the search runs here: %s", error)
            return None
        hits = []
        for query_D in query_QD:
            nearest = database.nearest(self.embedder.id, query_D, k, seqs)
            if nearest is None or any(near.text_digest != digest_of(near.record) for near in nearest):
                return None
            hits.append([Hit(near.record, near.score, near.key_D) for near in nearest])
        return hits

    def _evidence(self, query_D: np.ndarray, record: Record) -> str:
        kinds, texts = zip(*texts_of(record), strict=True)
        scores_N = self._embedded(texts).astype(np.float64) @ query_D
        best = int(np.argmax(scores_N))
        return f"{kinds[best]} {excerpt(texts[best])!r} ({scores_N[best]:.2f})"

    def _filter(self, snapshot: _Snapshot, query_QD: np.ndarray, k: int, filters: Filters) -> list[list[Hit]]:
        # the nearest few mostly suffice for a filter that many pass, and spare the long list of all that pass. For a key of
        # a base model the list is always made, which warns of namesakes
        if filters.key is None:
            num_tried = 4 * k + _NUM_TRIED
            tried = self._hits(snapshot, snapshot.keys.search(query_QD, num_tried))
            passing = [[hit for hit in hits if filters.passes(hit.record)][:k] for hits in tried]
            if num_tried >= len(snapshot.keys) or all(len(hits) == k for hits in passing):
                return passing
        seqs = self.hub.seqs(filters)
        return self._hits(snapshot, snapshot.keys.search(query_QD, k, np.array(seqs, np.int64)))

    def _hits(self, snapshot: _Snapshot, found: Sequence[Hits]) -> list[list[Hit]]:
        known = snapshot.records
        missing = sorted({seq for one in found for seq in one.seqs_K.tolist()} - known.keys())
        if missing:
            if len(known) > _MAX_RECORDS:
                known.clear()
            known = {**known, **self.hub.records_at(missing)}
            snapshot.records.update(known)
        # indexes report six decimals in fp32; rounding gives Python floats their short form back. An adapter removed since
        # the snapshot has no record any more
        query_hits = []
        for one in found:
            rows = zip(one.scores_K.tolist(), one.seqs_K.tolist(), one.keys_KD, strict=True)
            query_hits.append([Hit(known[seq], round(score, 6), key_D) for score, seq, key_D in rows if seq in known])
        return query_hits

    def _update(self) -> _Snapshot:
        snapshot = self._snapshot
        if snapshot is not None and snapshot.generation == self.hub.generation:
            return snapshot
        # threads that search first wait for one reading of the hub
        with self._lock:
            snapshot = self._snapshot
            if snapshot is None:
                snapshot = self._follow(self._saved() if len(self.hub) >= flat.FEW_KEYS else self._empty())
                if snapshot.keys.num_late > MAX_LATE:
                    # joined, so that the next process can map all of it
                    snapshot = replace(snapshot, keys=snapshot.keys.joined())
            elif snapshot.generation != self.hub.generation:
                snapshot = self._follow(snapshot)
            else:
                return snapshot
            if len(snapshot.keys) >= flat.FEW_KEYS:
                snapshot = self._save(snapshot)
            self._snapshot = snapshot
        return snapshot

    @property
    def _places(self) -> list[Path]:
        """The folders that may hold a saved index; a new one is written to the last of them."""
        # a folder that cannot be written may still hold a saved index
        return [self.hub.path] if self.hub.writable else [self.hub.path, local_folder(str(self.hub.path.absolute()))]

    def _saved(self) -> _Snapshot:
        wanted = Stamp("", 0, self.embedder.id, self._index)
        for files in index_files():
            opened = files.load(self._places, wanted, self.embedder.dim, self._choice)
            if opened is not None:
                keys, stamp = opened
                return _Snapshot(stamp.identity, stamp.generation, keys, {})
        return self._empty()

    def _empty(self) -> _Snapshot:
        return _Snapshot("", 0, Keys(self.embedder.dim, self._choice), {})

    def _follow(self, old: _Snapshot) -> _Snapshot:
        """Return the snapshot updated by later changes; built anew if the catalogue is not a later state of the same one."""
        gone, records = [], dict(old.records)
        seqs: list[int] = []
        # room for all keys if all are read: joining them by a copy would be a tenth of the work
        room_ND = np.empty((0 if old.generation else len(self.hub), self.embedder.dim), np.float32)
        parts = [room_ND[:0]]
        missing: dict[str, _Missing] = {}
        first, after = None, 0
        while True:
            changes = self.hub.changes(self.embedder.id, since=old.generation, after=after)
            first = first or changes
            if old.generation and (changes.identity != old.identity or changes.generation < old.generation):
                return self._follow(self._empty())
            if old.generation:
                for change in changes.page:
                    records.pop(change.seq, None)
                    gone.append(change.seq)
            present = {change.seq: (change.said, change.vector) for change in changes.page if change.said is not None}
            part_ND = room_ND[len(seqs) : len(seqs) + len(present)]
            if len(part_ND) < len(present):
                part_ND = np.empty((len(present), self.embedder.dim), np.float32)
            parts.append(part_ND)
            seqs += present
            unfilled = self._fill(part_ND, present.values())
            # after a rename another adapter may have the name
            if len(missing) >= _MANY_MISSING or unfilled.keys() & missing.keys() or not changes.page:
                self._make(missing)
                missing = {}
            missing |= unfilled
            if not changes.page:
                break
            after = changes.page[-1].seq
        keys_ND = room_ND[: len(seqs)] if len(seqs) <= len(room_ND) else np.concatenate(parts)
        followed = old.keys.changed(np.array(gone, np.int64), np.array(seqs, np.int64), keys_ND)
        if len(followed) != changes.num_adapters and changes.generation == first.generation and old.generation:
            # a catalogue restored from a copy has the same identity, but its later generations have other changes
            return self._follow(self._empty())
        return _Snapshot(first.identity, first.generation, followed, records)

    def _save(self, snapshot: _Snapshot) -> _Snapshot:
        """Return the snapshot with its keys saved and memory-mapped by an extension; unchanged if none saves them."""
        stamp = Stamp(snapshot.identity, snapshot.generation, self.embedder.id, self._index)
        for files in index_files() if len(snapshot.keys.segments) == 1 else ():
            mapped = files.save(self._places[-1], stamp, snapshot.keys)
            if mapped is not None:
                return replace(snapshot, keys=mapped)
        return snapshot

    def _fill(
        self, keys_ND: np.ndarray, present: Collection[tuple[Said, tuple[str, np.ndarray] | None]]
    ) -> dict[str, _Missing]:
        """Copy the stored key of each adapter with unchanged texts to `keys_ND`; return the other adapters by name."""
        keys: list[np.ndarray] = []
        missing = {}
        for said, stored in present:
            digest = digest_of(said)
            for known in (stored, self._unstored.get(said.name)) if self._unstored else (stored,):
                if known is not None and known[0] == digest and known[1].size == self.embedder.dim:
                    keys.append(known[1])
                    break
            else:
                missing[said.name] = _Missing(said, digest, keys_ND[len(keys)])
                keys.append(keys_ND[len(keys)])
        np.concatenate([np.empty(0, np.float32), *keys], out=keys_ND.reshape(-1))
        return missing

    def _make(self, missing: Mapping[str, _Missing]) -> None:
        """Embed the keys of these adapters, write them to their arrays, and store them in the catalogue."""
        if missing:
            _logger.info("embedding %d adapters with %s", len(missing), self.embedder.id)
        for part, made in made_keys(self._embedded, self._given, [one.said for one in missing.values()]):
            rows = []
            for said, key_D in zip(part, made, strict=True):
                one = missing[said.name]
                one.key_D[:] = key_D
                rows.append((said.name, one.digest, key_D))
            try:
                self.hub.store_vectors(self.embedder.id, rows)
            except HubError as error:
                # searching only reads: a hub that is read-only, full or locked still answers, from what is kept here
                _logger.info("%d embeddings are not stored: %s", len(rows), error)
                self._unstored = {**self._unstored, **{name: (digest, key_D) for name, digest, key_D in rows}}


# the cached embeddings of adapters' own texts, by hub and embedder: a new search of the hub does not embed them again
_OWN_TEXTS: weakref.WeakKeyDictionary[Any, dict[tuple[type, str], Embed]] = weakref.WeakKeyDictionary()


def _own_texts(hub: Listing, embedder: Embedder) -> Embed:
    """Return the function that embeds and caches an adapter's texts, shared by the hub's searches with this embedder."""
    stored = kept_on_disk if isinstance(embedder, Sentence) else embed_checked
    cache = lru_cache(maxsize=NUM_EVIDENCE_CACHED)(partial(stored, embedder))
    if isinstance(hub, weakref.ProxyTypes):
        return cache
    return _OWN_TEXTS.setdefault(hub, {}).setdefault((type(embedder), embedder.id), cache)


def kept_on_disk(embedder: Embedder, texts: tuple[str, ...]) -> np.ndarray:
    """Return vectors (N, dim) of an adapter's texts, read from the cache folder if an earlier process embedded them."""
    folder = cache_folder() / "texts"
    file = folder / f"{text_digest(json.dumps([embedder.id, texts]))}.npy"
    with suppress(OSError, ValueError, EOFError):
        kept_ND: np.ndarray = np.load(file, allow_pickle=False)
        if kept_ND.shape == (len(texts), embedder.dim):
            return kept_ND
    rows_ND = embed_checked(embedder, texts)
    # a cache that is read-only or full only costs time
    with suppress(OSError, HubError), unsynced():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, rows_ND)
        if len(files := list(folder.iterdir())) > NUM_EVIDENCE_CACHED:
            for old in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) // 2]:
                old.unlink(missing_ok=True)
    return rows_ND


def most_similar(own: Adapter, records: Iterable[Record], read: Callable[[str], Adapter], k: int) -> list[Candidate]:
    """Return the k adapters whose updates have the largest cosine with `own`'s; `read` opens one. See `Hub.similar`."""
    # imports torch, which a search by texts can do without
    from loraweave.hub.adapter import cosine

    count = checked_count(k)
    candidates = []
    for record in records:
        if record.name == own.name:
            continue
        try:
            other = read(record.name)
        except (AdapterCorrupt, AdapterNotFound, AdapterQuarantined) as error:
            warnings.warn(f"left out of the comparison with {own.name!r}: {error}", stacklevel=3)
            continue
        score, num_shared = cosine(own, other)
        if num_shared:
            evidence = f"updates {num_shared} of the {len(own.layers)} layers of {own.name!r}"
            candidates.append(Candidate(record.name, score, evidence, record))
    return sorted(candidates, key=lambda candidate: -candidate.score)[:count]


def checked_count(k: Any, name: str = "k", least: int = 0) -> int:
    """Return the count as an int. Raises RetrievalError unless it is a whole number of at least `least`."""
    try:
        count = operator.index(k)
    except TypeError:
        count = -1
    if isinstance(k, bool) or count < least:
        raise RetrievalError(f"{name} is {k!r}; it counts candidates and must be an int of {least} or more")
    return count


def checked_threshold(min_score: Any) -> None:
    """Raise RetrievalError if the threshold is neither None nor a finite number."""
    if min_score is not None and not is_number(min_score):
        raise RetrievalError(f"min_score is {min_score!r}; it must be a finite number, or None for no threshold")
