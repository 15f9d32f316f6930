"""Mean of the sample inputs against the mean of the query's inputs (LoraRetriever, Zhao et al. 2024)."""

from collections.abc import Sequence

import numpy as np

from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record


class Mean:
    """The cosine of the mean sample input with the query's mean input: the strongest and cheapest single key for inputs."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        query_D = space.mean(space.embed(query.inputs))
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            if query.inputs and any(text.strip() for text in record.examples):
                scores_N[row] = query_D @ space.sample_mean(record)
        return scores_N
