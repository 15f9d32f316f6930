"""The adapter's description against the query's, or against the query's examples if it has no description."""

from collections.abc import Sequence

import numpy as np

from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record


class Description:
    """The cosine of the adapter's description with the query's, or else with the mean of the query's inputs and outputs."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        texts = [query.description] if query.description.strip() else [*query.inputs, *filter(str.strip, query.outputs)]
        query_D = space.mean(space.embed(texts))
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            if texts and record.description.strip():
                scores_N[row] = query_D @ space.embed([record.description])[0]
        return scores_N
