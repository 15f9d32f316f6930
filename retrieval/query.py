"""The inputs of a search (its keywords, and what is known of a task), the interface of keys, and their view of the hub."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

import numpy as np

from loraweave.common.checks import is_list, is_number, is_whole, says_something
from loraweave.errors import HubError, RetrievalError
from loraweave.hub.embedders._embedder import unit
from loraweave.hub.hub import Hub
from loraweave.hub.search.keys import MAX_SAMPLE_INPUTS
from loraweave.hub.search.search import Hit, SearchIndex, checked_count, checked_threshold
from loraweave.hub.tables.filtering import Filters
from loraweave.types import BaseKey, Candidate, Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter

Search = TypeVar("Search", bound=Callable[..., Any])

# the number of hits that diversity chooses from: at least, and per wanted candidate
_MIN_CHOICE = 50
_CHOICE_PER_CANDIDATE = 5


class SearchOptions(TypedDict, total=False):
    """The keywords that every search of a Retriever takes."""

    k: int
    base_model: str | BaseKey | None
    license: Collection[str] | str | None
    tags: Collection[str] | str
    min_score: float | None
    diversity: float
    max_rank: int | None
    max_size_bytes: int | None
    language: Collection[str] | str | None
    after: Candidate | None


@dataclass(frozen=True)
class Request:
    """The keywords of one search. Raises RetrievalError for a value that is invalid or excludes another."""

    k: int = 20
    base_model: str | BaseKey | None = None
    license: Collection[str] | str | None = None
    tags: Collection[str] | str = ()
    min_score: float | None = None
    diversity: float = 0.0
    max_rank: int | None = None
    max_size_bytes: int | None = None
    language: Collection[str] | str | None = None
    after: Candidate | None = None
    evidence: bool = True

    def __post_init__(self) -> None:
        checked_count(self.k)
        checked_threshold(self.min_score)
        if not is_number(self.diversity, 0, 1):
            raise RetrievalError(f"diversity is {self.diversity!r}; it must be from 0 (best fit) to 1 (most different)")
        if self.after is not None and self.diversity:
            raise RetrievalError(
                f"after={self.after.name!r} pages through candidates by score, which diversity={self.diversity:g} does not "
                "keep to; ask for more candidates at once, or for diversity=0"
            )
        for name, limit in (("max_rank", self.max_rank), ("max_size_bytes", self.max_size_bytes)):
            if limit is not None and not is_whole(limit, 0):
                raise RetrievalError(f"{name} is {limit!r}; it must be an int of 0 or more, or None for no limit")

    @property
    def num_choice(self) -> int:
        """The number of hits that diversity chooses from, or of hits returned without diversity."""
        return max(_MIN_CHOICE, _CHOICE_PER_CANDIDATE * self.k) if self.diversity and self.k else self.k

    def choose(self, hits: list[Hit]) -> list[Hit]:
        """Choose the answer from `hits`: the diverse ones, or all of them without diversity."""
        return diverse(hits, self.k, self.diversity) if self.diversity else hits

    @property
    def filters(self) -> Filters:
        return Filters(self.base_model, self.license, self.tags, self.language, self.max_rank, self.max_size_bytes)

    def is_settled_by(self, hits: Sequence[Hit], count: int) -> bool:
        """Return True if further hits, whose scores are at most the last one's, cannot change the page of `count` hits."""
        if not hits or not count:
            return not count
        if self.min_score is not None and hits[-1].score < self.min_score:
            return True
        # hits that tie with `after` may come before or behind it: it must be among the hits, or all of its score must be
        last = self.after
        seen = last is None or hits[-1].score < last.score or any(hit.record.name == last.name for hit in hits)
        return seen and len(self.page(hits, count)) == count

    def page(self, hits: Sequence[Hit], count: int) -> list[Hit]:
        """Return the first `count` of the hits after the candidate `after`, without those below `min_score`.

        If that candidate is gone or its score has changed, the page starts at its old score. Additions and removals between
        pages neither repeat nor hide a candidate, except that candidates tied with a removed `after` come again.
        """
        fitting = list(hits)
        if self.after is not None:
            last = self.after
            place = next((i for i, h in enumerate(fitting) if h.record.name == last.name and h.score == last.score), None)
            lower = [hit for hit in fitting if hit.score <= last.score and hit.record.name != last.name]
            fitting = lower if place is None else fitting[place + 1 :]
        enough = self.min_score
        return [hit for hit in fitting[:count] if enough is None or hit.score >= enough]


@dataclass(frozen=True, eq=False)
class Query:
    """The known parts of one task: inputs, outputs, a description, an adapter.

    `outputs` is empty, or has one text for each input, "" for an input without output. A key compares one of these parts,
    and scores NaN for a query that lacks that part.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    description: str = ""
    adapter: Adapter | None = None


def diverse(hits: Sequence[Hit], num_wanted: int, diversity: float) -> list[Hit]:
    """Choose hits by maximal marginal relevance, in their original order (by score)."""
    if not hits or not num_wanted:
        return []
    keys_ND = np.stack([hit.key_D for hit in hits]).astype(np.float64)
    scores_N = np.array([hit.score for hit in hits])
    open_N = np.ones(len(hits), dtype=bool)
    # the first is the best fit at any diversity: there is nothing yet that it could resemble
    nearest_N = np.full(len(hits), -np.inf)
    chosen = [0]
    while len(chosen) < min(num_wanted, len(hits)):
        open_N[chosen[-1]] = False
        nearest_N = np.maximum(nearest_N, keys_ND @ keys_ND[chosen[-1]])
        gain_N = (1 - diversity) * scores_N - diversity * nearest_N
        chosen.append(int(np.argmax(np.where(open_N, gain_N, -np.inf))))
    return [hits[position] for position in sorted(chosen)]


def shows_options(search: Search) -> Search:
    """Put the keywords of `SearchOptions`, with their defaults, in the signature that help() and editors show."""
    signature, shared = inspect.signature(search), inspect.signature(Request).parameters
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    shown = [shared[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in SearchOptions.__annotations__]
    search.__signature__ = signature.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
    return search


def key_name(key: Key) -> str:
    """Name a key object by its class, as the registry's files are named: `MyKey` is "my_key"."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(key).__name__).lstrip("_")


class Key(Protocol):
    """A score of how well an adapter fits a query by one kind of evidence, such as its sample inputs or its weights.

    `scores` returns a number from -1 to 1 for each record (N,), higher for a better fit, NaN if the query or the record
    lacks what the key compares. A record's score does not depend on the order of the records, nor on the other records
    unless the key has the trait `relative`.
    """

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray: ...


# adapters whose texts stay embedded: 50 x 428 x 4 bytes = 86 kB each at most
_NUM_TEXTS_CACHED = 2048
_NUM_ADAPTERS_CACHED = 64
# the limit of cached vectors that keys made of records; when it is reached, all are dropped
_NUM_MADE_KEPT = 8192


class KeySpace:
    """A hub as keys see it: its records' texts, embedded by one embedder, and its adapters; both are cached."""

    def __init__(self, hub: Hub, index: SearchIndex) -> None:
        self.hub = hub
        self._index = index
        self._embed = lru_cache(maxsize=_NUM_TEXTS_CACHED)(index.embed)
        # by name and content hash
        self._adapter = lru_cache(maxsize=_NUM_ADAPTERS_CACHED)(lambda name, content_hash: hub[name])
        self._made_once: dict[tuple[str, str], tuple[Record, np.ndarray]] = {}

    @property
    def dim(self) -> int:
        """The length of a text's vector."""
        return self._index.embedder.dim

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts as unit vectors (N, dim), float64; (0, dim) without texts."""
        if not texts:
            return np.empty((0, self.dim))
        return self._embed(tuple(texts)).astype(np.float64)

    def samples(self, record: Record) -> np.ndarray:
        """Return the vectors of the record's sample inputs (M, dim)."""
        return self._index.samples(record).astype(np.float64)

    def pairs(self, record: Record) -> list[tuple[str, str]]:
        """Pair the sample inputs with the card's `outputs`, without empty ones; [] unless there is one for each."""
        outputs = record.card.get("outputs")
        if not is_list(outputs) or len(outputs) != len(record.examples):
            return []
        pairs = zip(record.examples, outputs, strict=True)
        return [(i, o) for i, o in pairs if i.strip() and says_something(o)][:MAX_SAMPLE_INPUTS]

    def once(self, what: str, record: Record, make: Callable[[Record], np.ndarray]) -> np.ndarray:
        """Return `make(record)`, cached until the record changes. `what` names the kind of vector in the cache."""
        known = self._made_once.get((what, record.name))
        if known is not None and (known[0] is record or known[0] == record):
            return known[1]
        if len(self._made_once) >= _NUM_MADE_KEPT:
            self._made_once = {}
        made = make(record)
        self._made_once[what, record.name] = (record, made)
        return made

    def sample_mean(self, record: Record) -> np.ndarray:
        """Return the direction of the mean of the record's sample inputs (dim,); zeros if it has none."""
        return self.once("sample mean", record, lambda record: self.mean(self.samples(record)))

    def mean(self, rows_ND: np.ndarray) -> np.ndarray:
        """Return the direction of the rows' mean (dim,); zeros without rows."""
        return unit(rows_ND.mean(axis=0)).astype(np.float64) if len(rows_ND) else np.zeros(self.dim)

    def adapter(self, record: Record) -> Adapter:
        """Load the record's adapter. Raises a HubError if it is missing or damaged."""
        return self._adapter(record.name, record.hash)

    def stored(self, key_id: str, records: Sequence[Record], make: Callable[[Adapter], np.ndarray]) -> np.ndarray:
        """Return each adapter's vector by `make` (N, D), stored in the catalogue as `key_id`; NaN for a damaged adapter."""
        known = self.hub.vectors(key_id)
        rows: list[np.ndarray | None] = []
        made = []
        for record in records:
            digest, vector_D = known.get(record.name, ("", None))
            if digest != record.hash or vector_D is None:
                vector_D = None
                with suppress(HubError):
                    vector_D = make(self.adapter(record)).astype(np.float32)
                    made.append((record.name, record.hash, vector_D))
            rows.append(vector_D)
        if made:
            # a hub that is read-only, full or locked is searched all the same; the vectors are made again next time
            with suppress(HubError):
                self.hub.store_vectors(key_id, made)
        width = max((len(row) for row in rows if row is not None), default=0)
        return np.array([np.full(width, np.nan) if row is None else row for row in rows], dtype=np.float64).reshape(
            -1, width
        )
