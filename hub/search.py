"""Finding adapters by what they do: a key per adapter, an index over the keys, and the reasons for a hit.

The scheme is LoraRetriever's (Zhao et al. 2024): an adapter's key is the mean embedding of sample inputs, the query is
the embedding of the input at hand, the score their inner product. Unlike the original, keys have unit norm again: the
norm of a mean grows with how alike the samples are, so that it would favour narrow adapters (recall@1 on the pool's
training inputs .49 without, .58 with). The catalogue is the truth; the index is rebuilt in memory when the hub changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import operator
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loraweave import registry
from loraweave.errors import DimensionMismatch, HubError, RetrievalError
from loraweave.hub.database_search import DatabaseSearch
from loraweave.types import Candidate, Record

if TYPE_CHECKING:
    from loraweave.hub.hub import Hub

# The description's share of a key. The largest that costs queries by inputs nothing on the pool's training rows, while
# queries by another wording of it find the adapter first in .68 instead of .19 of the cases (benchmarks/retrieval.py).
# 0.5 would give .87, but lose .02 of recall@1 from one input.
DESCRIPTION_WEIGHT = 0.3

# more sample inputs hardly move a mean, but each costs an embedding
MAX_SAMPLE_INPUTS = 50

# adapters whose sample inputs stay embedded for the evidence: 50 x 384 x 4 bytes = 77 kB each at most
NUM_EVIDENCE_CACHED = 1024

_logger = logging.getLogger(__name__)


class Embedder(Protocol):
    """Texts to unit vectors. `id` names all that decides a vector, so that vectors of two embedders are never mixed."""

    dim: int

    @property
    def id(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


class Index(Protocol):
    """The k largest inner products of each query: scores descending, ties by position; k above the count gives all."""

    def add(self, vectors_ND: np.ndarray) -> None: ...

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Hit:
    """An adapter found, its score, and its key."""

    record: Record
    score: float
    key_D: np.ndarray


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """The index as of one generation of the hub; never changed, so that threads can share it."""

    generation: int
    records: tuple[Record, ...]
    keys_ND: np.ndarray
    index: Index


def search(
    hub: Hub,
    query: str,
    *,
    k: int = 5,
    base_model: str | None = None,
    license: Collection[str] | str | None = None,
    tags: Collection[str] | str = (),
    min_score: float | None = None,
) -> list[Candidate]:
    """The k adapters of the hub that fit a text best; `Hub.search`. [] when nothing reaches `min_score`."""
    if not isinstance(query, str):
        raise RetrievalError(f"the query must be one text, not {type(query).__name__}; Retriever takes several")
    index = _SHARED.get(hub)
    if index is None:
        # through a proxy: the cached index must not keep the hub open after its last user let go of it
        index = _SHARED[hub] = SearchIndex(weakref.proxy(hub))
    checked_threshold(min_score)
    num_wanted = checked_count(k)
    query_QD = index.embed([query])
    hits = index.hits(query_QD, num_wanted, base_model=base_model, license=license, tags=tags, min_score=min_score)
    return index.explained(query_QD[0], hits[0])


_SHARED: weakref.WeakKeyDictionary[Any, SearchIndex] = weakref.WeakKeyDictionary()


class SearchIndex:
    """The searchable form of a hub. It follows the hub: what was added, changed or removed counts from the next search.

    `embedder` is a name of the registry or an object with `dim`, `id` and `embed`; `index` is a name, or "auto" for the
    database where it ranks vectors itself, else faiss where it is installed. Raises UnknownName for other names.
    """

    def __init__(self, hub: Hub, *, embedder: str | Embedder = "sentence", index: str = "auto") -> None:
        in_database = hub.vector_search if index == "auto" else None
        if index == "auto":
            index = "faiss_flat" if importlib.util.find_spec("faiss") else "flat"
        self.hub = hub
        self.embedder: Embedder = registry.get("embedders", embedder)() if isinstance(embedder, str) else embedder
        self._index_class = registry.get("indexes", index)
        self._snapshot: _Snapshot | None = None
        self._unstored: dict[str, tuple[str, np.ndarray]] = {}
        self._database = (
            None if in_database is None else DatabaseSearch(hub, in_database, self.embedder.id, self._key, _digest)
        )
        self._embedded = lru_cache(maxsize=NUM_EVIDENCE_CACHED)(self._embed)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (Q, D) of query texts. RetrievalError for what is not a text or has no visible character."""
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise RetrievalError(f"query {number} of {len(texts)} is {type(text).__name__}, not a text")
            if not text.strip():
                raise RetrievalError(
                    f"query {number} of {len(texts)} is empty ({text[:20]!r}): it says nothing about a task; "
                    "search by an example input or a description of the task"
                )
        return self._embed(tuple(texts))

    def hits(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        base_model: str | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """For each query the k best adapters that pass the filters, by descending score, ties in order of addition."""
        checked_threshold(min_score)
        if self._database is not None and k and len(self.hub):
            near = self._database.hits(query_QD, k, self._allowed(base_model, license, tags))
            if near is not None:
                return [
                    [Hit(n.record, n.score, n.key_D) for n in found if min_score is None or n.score >= min_score]
                    for found in near
                ]
        snapshot = self._current()
        num_adapters = len(snapshot.records)
        if not num_adapters:
            _logger.info("the hub is empty, so nothing is found: hub.add(folder, description=..., examples=[...]) fills it")
        if not num_adapters or not k:
            return [[] for _ in query_QD]
        allowed = self._allowed(base_model, license, tags)
        # a filter may drop any number of hits, so then all are ranked
        scores_QK, positions_QK = snapshot.index.search(query_QD, k if allowed is None else num_adapters)
        found = []
        # indexes report six decimals in fp32; as Python floats they get their short form back
        for scores, positions in zip(scores_QK.tolist(), positions_QK.tolist(), strict=True):
            ranked = [
                Hit(snapshot.records[p], round(s, 6), snapshot.keys_ND[p]) for s, p in zip(scores, positions, strict=True)
            ]
            fitting = [hit for hit in ranked if allowed is None or hit.record.name in allowed]
            found.append([hit for hit in fitting[:k] if min_score is None or hit.score >= min_score])
        return found

    def explained(self, query_D: np.ndarray, hits: Sequence[Hit]) -> list[Candidate]:
        """The hits as candidates; the evidence is the adapter's own text that is nearest to the query."""
        return [Candidate(hit.record.name, hit.score, self._evidence(query_D, hit.record), hit.record) for hit in hits]

    def _evidence(self, query_D: np.ndarray, record: Record) -> str:
        kinds, texts = zip(*_texts(record), strict=True)
        scores_N = self._embedded(texts).astype(np.float64) @ query_D
        best = int(np.argmax(scores_N))
        return f"{kinds[best]} {_excerpt(texts[best])!r} ({scores_N[best]:.2f})"

    def _allowed(
        self, base_model: str | None, license: Collection[str] | str | None, tags: Collection[str] | str
    ) -> set[str] | None:
        if base_model is None and license is None and not tags:
            return None
        return {record.name for record in self.hub.records(base_model=base_model, license=license, tags=tags)}

    def _current(self) -> _Snapshot:
        # the generation is read before the rows: a write in between makes the next search look again, never the reverse
        generation = self.hub.generation
        snapshot = self._snapshot
        if snapshot is None or snapshot.generation != generation:
            records = tuple(self.hub.records())
            keys_ND = self._keys(records)
            index = self._index_class(self.embedder.dim)
            index.add(keys_ND)
            self._snapshot = snapshot = _Snapshot(generation, records, keys_ND, index)
        return snapshot

    def _keys(self, records: Sequence[Record]) -> np.ndarray:
        """The key of every adapter (N, D): stored ones where their texts are unchanged, else made and stored."""
        stored = self.hub.vectors(self.embedder.id)
        digests = [_digest(record) for record in records]
        keys_ND = np.empty((len(records), self.embedder.dim), dtype=np.float32)
        missing = []
        for position, (record, digest) in enumerate(zip(records, digests, strict=True)):
            choices = (stored.get(record.name), self._unstored.get(record.name))
            known = next((c[1] for c in choices if c and c[0] == digest and c[1].shape == keys_ND.shape[1:]), None)
            if known is None:
                missing.append(position)
            else:
                keys_ND[position] = known
        if missing:
            _logger.info("embedding %d of %d adapters with %s", len(missing), len(records), self.embedder.id)
            for position in missing:
                keys_ND[position] = self._key(records[position])
            self._store([(records[position].name, digests[position], keys_ND[position]) for position in missing])
        return keys_ND

    def _store(self, made: list[tuple[str, str, np.ndarray]]) -> None:
        try:
            self.hub.store_vectors(self.embedder.id, made)
        except HubError as error:
            # searching only reads: a hub that is read-only, full or locked still answers, from what is kept here
            _logger.info("%d embeddings are not stored: %s", len(made), error)
            self._unstored = {**self._unstored, **{name: (digest, key_D) for name, digest, key_D in made}}

    def _key(self, record: Record) -> np.ndarray:
        kinds, texts = zip(*_texts(record), strict=True)
        rows_ND = self._embedded(texts).astype(np.float64)
        samples_ND = rows_ND[[kind == "sample input" for kind in kinds]]
        if not len(samples_ND):
            return unit(rows_ND[0])
        key_D = unit(samples_ND.mean(axis=0))
        return unit(key_D + DESCRIPTION_WEIGHT * rows_ND[-1]) if kinds[-1] == "description" else key_D

    def _embed(self, texts: tuple[str, ...]) -> np.ndarray:
        rows_ND = np.asarray(self.embedder.embed(texts), dtype=np.float32)
        wanted = (len(texts), self.embedder.dim)
        if rows_ND.shape != wanted:
            raise DimensionMismatch(
                f"embedder {self.embedder.id!r} gave embeddings of shape {rows_ND.shape} instead of {wanted} (texts, dim)"
            )
        for number in np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))[:1]:
            raise DimensionMismatch(
                f"embedder {self.embedder.id!r} gave an embedding that is not finite, "
                f"for text {number + 1} of {len(texts)}: {_excerpt(texts[number])!r}"
            )
        return rows_ND


def checked_count(k: Any) -> int:
    """k as an int. RetrievalError when it is not a whole number of 0 or more."""
    try:
        count = operator.index(k)
    except TypeError:
        count = -1
    if isinstance(k, bool) or count < 0:
        raise RetrievalError(f"k is {k!r}; it counts candidates and must be an int of 0 or more")
    return count


def checked_threshold(min_score: Any) -> None:
    """RetrievalError when the threshold is neither None nor a finite number."""
    if min_score is not None and not (isinstance(min_score, int | float | np.number) and math.isfinite(min_score)):
        raise RetrievalError(f"min_score is {min_score!r}; it must be a finite number, or None for no threshold")


def unit(vector_D: np.ndarray) -> np.ndarray:
    """The vector at norm 1. A zero vector stays zero: it scores 0 with everything."""
    norm = float(np.linalg.norm(vector_D))
    scaled: np.ndarray = (vector_D / norm if norm else vector_D).astype(np.float32)
    return scaled


def _texts(record: Record) -> list[tuple[str, str]]:
    """What speaks for an adapter, as (kind, text): sample inputs and description, or without both its name."""
    samples = [text for text in record.examples if text.strip()][:MAX_SAMPLE_INPUTS]
    texts = [("sample input", text) for text in samples]
    if record.description.strip():
        texts.append(("description", record.description))
    return texts or [("name", record.name)]


def _digest(record: Record) -> str:
    # the weight enters, since another release may weigh otherwise
    settled = json.dumps([DESCRIPTION_WEIGHT, _texts(record)])
    return hashlib.sha256(settled.encode()).hexdigest()


def _excerpt(text: str, limit: int = 60) -> str:
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 4].rstrip() + " ..."
