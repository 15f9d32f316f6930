"""The keywords of a search: how much of it is wanted, and of which adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np

from loraweave.common.checks import is_number, is_whole
from loraweave.errors import RetrievalError
from loraweave.hub.search.search import Hit, checked_count, checked_threshold
from loraweave.hub.tables.filtering import Filters
from loraweave.types import BaseKey, Candidate

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter


Search = TypeVar("Search", bound=Callable[..., Any])

# how many hits diversity chooses from, at least and per candidate wanted
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
    """The keywords of one search. Raises RetrievalError for a value that makes no sense."""

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
        """Return whether the page of `count` stays as it is when more hits follow these, which are in descending order."""
        if not hits or not count:
            return not count
        if self.min_score is not None and hits[-1].score < self.min_score:
            return True
        # equals of the last candidate are before or behind it: it must have been seen, or all of its score
        last = self.after
        seen = last is None or hits[-1].score < last.score or any(hit.record.name == last.name for hit in hits)
        return seen and len(self.page(hits, count)) == count

    def page(self, hits: Sequence[Hit], count: int) -> list[Hit]:
        """Return the first `count` of the hits after the candidate `after`, without those below `min_score`.

        Where that candidate's score has changed since, or it is gone, its old score marks the place. What is added or
        removed between pages then repeats and hides nothing, but candidates that tied with one that is gone come again.
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

    `outputs` has one for each input, empty where it has none, or is empty as a whole. A key compares the part that it
    knows; a query that lacks this part gets no opinion from it.
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
