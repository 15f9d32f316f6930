"""Means as the linear discriminant sees them: directions in which one adapter's sample inputs vary anyway count less."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraweave.errors import RetrievalError
from loraweave.retrieval.key_space import KeySpace
from loraweave.retrieval.query import Query
from loraweave.types import Record

# adapters that the common covariance is taken over, evenly spaced; more hardly move it
MAX_ADAPTERS = 256


class Discriminant:
    """The cosine of the query's mean with an adapter's, both around the mean of all and whitened within adapters.

    `shrinkage`, 0 to 1, draws the covariance towards a multiple of the identity: few samples know few directions.
    """

    def __init__(self, *, shrinkage: float = 0.5) -> None:
        if not 0 < shrinkage <= 1:
            raise RetrievalError(f"shrinkage is {shrinkage}; it must be above 0 and at most 1")
        self.shrinkage = shrinkage

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        sampled = [row for row, record in enumerate(records) if len(space.samples(record))]
        scores_N = np.full(len(records), np.nan)
        if not query.inputs or not sampled:
            return scores_N
        means_ND = np.stack([space.samples(records[row]).mean(axis=0) for row in sampled])
        centre_D = means_ND.mean(axis=0)
        precision_DD = np.linalg.inv(self._covariance([space.samples(records[row]) for row in sampled]))
        around_ND = means_ND - centre_D
        query_D = space.embed(query.inputs).mean(axis=0) - centre_D
        norms_N = np.sqrt(np.einsum("nd,de,ne->n", around_ND, precision_DD, around_ND) * (query_D @ precision_DD @ query_D))
        # the only adapter is the centre itself: it lies in no direction
        scores_N[sampled] = around_ND @ precision_DD @ query_D / np.where(norms_N > 1e-12, norms_N, np.inf)
        return scores_N

    def _covariance(self, samples: list[np.ndarray]) -> np.ndarray:
        chosen = samples[:: -(-len(samples) // MAX_ADAPTERS)]
        residuals_MD = np.concatenate([rows_MD - rows_MD.mean(axis=0) for rows_MD in chosen])
        covariance_DD = residuals_MD.T @ residuals_MD / max(1, len(residuals_MD) - len(chosen))
        size = len(covariance_DD)
        # adapters of one sample each show no variation at all: then all directions are alike
        level = float(np.trace(covariance_DD)) / size or 1.0
        shrunk: np.ndarray = (1 - self.shrinkage) * covariance_DD + self.shrinkage * level * np.eye(size)
        return shrunk
