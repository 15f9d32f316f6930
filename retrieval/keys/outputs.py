"""Mean of the sample outputs against the mean of the query's outputs: what tells apart tasks with the same inputs."""

from collections.abc import Sequence

import numpy as np

from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record


class Outputs:
    """The cosine of the mean sample output with the query's mean output. The card's `outputs` hold one text per example."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        outputs = [output for output in query.outputs if output.strip()]
        query_D = space.mean(space.embed(outputs))
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            mean_D = space.once(
                "outputs", record, lambda r: space.mean(space.embed([output for _, output in space.pairs(r)]))
            )
            if outputs and mean_D.any():
                scores_N[row] = query_D @ mean_D
        return scores_N
