"""Which adapters fit an input, several inputs, or a task given by a few of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import overload

import numpy as np

from loraweave.errors import RetrievalError
from loraweave.hub.hub import Hub
from loraweave.hub.search import Embedder, Hit, SearchIndex, checked_count, checked_threshold, unit
from loraweave.types import Candidate

# Beside a few inputs a task's description weighs as much as their mean: on the pool's training rows the right adapter is
# then first in .96 instead of .76 of the cases, from five inputs and another wording of the description than the card's.
TASK_DESCRIPTION_WEIGHT = 1.0

# how many hits diversity chooses from, at least and per candidate wanted
_MIN_CHOICE = 50
_CHOICE_PER_CANDIDATE = 5


class Retriever:
    """Searches a hub. `embedder` and `index` are names of the registry (`loraweave.names`) or, for the first, an object.

    Scores are inner products of unit vectors, -1 to 1. Results are sorted by score, ties by order of addition. A result
    is [] when the hub is empty, nothing passes the filters, or nothing reaches `min_score`: then the base model is the
    answer. Texts are cut at what the embedder reads. RetrievalError for a text without a visible character, a k that is
    no int of 0 or more, a diversity outside 0 to 1.
    """

    def __init__(self, hub: Hub, *, embedder: str | Embedder = "sentence", index: str = "auto") -> None:
        self.hub = hub
        self._index = SearchIndex(hub, embedder=embedder, index=index)

    # mypy cannot know that the first case wins for a str, which is an Iterable[str] too
    @overload
    def candidates(  # type: ignore[overload-overlap]
        self,
        text_or_texts: str,
        *,
        k: int = 20,
        base_model: str | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
        diversity: float = 0.0,
    ) -> list[Candidate]: ...

    @overload
    def candidates(
        self,
        text_or_texts: Iterable[str],
        *,
        k: int = 20,
        base_model: str | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
        diversity: float = 0.0,
    ) -> list[list[Candidate]]: ...

    def candidates(
        self,
        text_or_texts: str | Iterable[str],
        *,
        k: int = 20,
        base_model: str | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
        diversity: float = 0.0,
    ) -> list[Candidate] | list[list[Candidate]]:
        """The k adapters that fit a text best, or for several texts a list for each.

        `diversity` above 0 trades fit for difference (maximal marginal relevance; Carbonell and Goldstein 1998): adapters
        are chosen one by one by (1 - diversity) * score - diversity * their largest similarity to one already chosen.
        """
        _check(k, min_score, diversity)
        several = [text_or_texts] if isinstance(text_or_texts, str) else list(text_or_texts)
        query_QD = self._index.embed(several)
        found = self._found(query_QD, k, base_model, license, tags, min_score, diversity)
        return found[0] if isinstance(text_or_texts, str) else found

    def for_task(
        self,
        texts: Iterable[str],
        *,
        description: str = "",
        k: int = 20,
        base_model: str | None = None,
        license: Collection[str] | str | None = None,
        tags: Collection[str] | str = (),
        min_score: float | None = None,
        diversity: float = 0.0,
    ) -> list[Candidate]:
        """The k adapters that fit one task best, by the mean embedding of several of its inputs.

        The mean of five inputs finds the right adapter much more often than one of them; a description of the task does
        more still. RetrievalError without any text and description.
        """
        _check(k, min_score, diversity)
        inputs = [texts] if isinstance(texts, str) else list(texts)
        query_D = np.zeros(self._index.embedder.dim)
        if inputs:
            query_D = query_D + unit(self._index.embed(inputs).astype(np.float64).mean(axis=0))
        if description.strip():
            query_D = query_D + TASK_DESCRIPTION_WEIGHT * self._index.embed([description])[0]
        elif not inputs:
            raise RetrievalError("a task needs at least one input or a description to search by; both are empty")
        return self._found(unit(query_D)[None], k, base_model, license, tags, min_score, diversity)[0]

    def _found(
        self,
        query_QD: np.ndarray,
        k: int,
        base_model: str | None,
        license: Collection[str] | str | None,
        tags: Collection[str] | str,
        min_score: float | None,
        diversity: float,
    ) -> list[list[Candidate]]:
        num_wanted = checked_count(k)
        num_choice = max(_MIN_CHOICE, _CHOICE_PER_CANDIDATE * num_wanted) if diversity and num_wanted else num_wanted
        hits = self._index.hits(query_QD, num_choice, base_model=base_model, license=license, tags=tags, min_score=min_score)
        chosen = [_diverse(found, num_wanted, diversity) if diversity else found for found in hits]
        return [self._index.explained(query_D, found) for query_D, found in zip(query_QD, chosen, strict=True)]


def _check(k: int, min_score: float | None, diversity: float) -> None:
    """Before the encoder is loaded and run for nothing."""
    checked_count(k)
    checked_threshold(min_score)
    if not (isinstance(diversity, int | float | np.number) and 0.0 <= diversity <= 1.0):
        raise RetrievalError(f"diversity is {diversity!r}; it must be from 0 (best fit) to 1 (most different)")


def _diverse(hits: list[Hit], num_wanted: int, diversity: float) -> list[Hit]:
    """The hits that maximal marginal relevance chooses, in their original order (by score)."""
    if not hits:
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
