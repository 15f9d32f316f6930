"""A search in two steps: the index brings the nearest adapters, keys score them, and a fusion makes one score of theirs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import numpy as np

from loraweave.errors import RetrievalError
from loraweave.hub.hub import Hub
from loraweave.hub.search import Hit, SearchIndex
from loraweave.retrieval.fusion import Fusion
from loraweave.retrieval.indexes._vectors import SCORE_DECIMALS
from loraweave.retrieval.key import Key
from loraweave.retrieval.key_space import KeySpace
from loraweave.retrieval.query import Query
from loraweave.retrieval.request import Request
from loraweave.types import Record


class KeyedSearch:
    """Scores a hub's adapters by keys. `shortlist`: how many the index brings; a hub of fewer adapters is scored whole."""

    def __init__(self, hub: Hub, index: SearchIndex, shortlist: int) -> None:
        if isinstance(shortlist, bool) or operator.index(shortlist) < 1:
            raise RetrievalError(f"shortlist is {shortlist!r}; it must be an int of 1 or more")
        self.hub = hub
        self.shortlist = shortlist
        self._index = index
        self.space = KeySpace(hub, index)

    def near(self, query_D: np.ndarray, request: Request) -> list[Hit]:
        """The shortlist of the index that passes the filters."""
        return self._index.hits(query_D[None], self.shortlist, request.filters)[0]

    def parts(self, query: Query, records: Sequence[Record], keys: Mapping[str, Key]) -> dict[str, np.ndarray]:
        """Each key's scores_N of the records."""
        return {name: key.scores(query, records, self.space) for name, key in keys.items()}

    def ranked(
        self, query: Query, hits: Sequence[Hit], keys: Mapping[str, Key], fusion: Fusion
    ) -> tuple[list[Hit], dict[str, str]]:
        """The hits by descending fused score, ties in their order, and by name what the keys said of each.

        Adapters that no key has an opinion on are left out.
        """
        if not hits:
            return [], {}
        parts = self.parts(query, [hit.record for hit in hits], keys)
        fused_N = np.round(fusion.fuse(parts), SCORE_DECIMALS)
        # stable: equal scores keep the order they came in
        order = [int(n) for n in np.argsort(-fused_N, kind="stable") if not np.isnan(fused_N[n])]
        opinions = {hits[n].record.name: _opinion({name: float(part_N[n]) for name, part_N in parts.items()}) for n in order}
        return [Hit(hits[n].record, float(fused_N[n]), hits[n].key_D) for n in order], opinions


def _opinion(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.2f}" for name, score in scores.items() if not np.isnan(score))


def key_name(key: Key) -> str:
    """A key object under the name of its class, as files of the registry are named."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(key).__name__).lstrip("_")
