"""A vote of all sample inputs: the mean similarity of each of the query's inputs to the sample inputs nearest to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraweave import Record
from loraweave.extend import Count, KeySpace, Query
from loraweave.extensions.retrieval_keys.keys._declared import DeclaredKey


class Voting(DeclaredKey):
    """The mean vote of the `nearest` (1 or more) sample inputs on each input, or of all where an adapter has fewer."""

    def __init__(self, *, nearest: Count = 5) -> None:
        self.nearest = nearest

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        query_QD = space.embed(query.inputs)
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            similar_QM = query_QD @ space.samples(record).T
            if similar_QM.size:
                scores_N[row] = np.sort(similar_QM, axis=1)[:, -self.nearest :].mean()
        return scores_N
