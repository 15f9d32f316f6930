"""Means as a linear discriminant compares them: directions in which one adapter's sample inputs vary anyway count less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraweave import Record
from loraweave.extend import KeySpace, Query, Share, traits
from loraweave.extensions.retrieval_keys.keys._declared import DeclaredKey

# adapters that the common covariance is taken over, evenly spaced; more hardly move it
MAX_ADAPTERS = 256


@dataclass(frozen=True, eq=False)
class _Whitened:
    """The adapters' means around their centre, and the inverse of their common covariance."""

    centre_D: np.ndarray
    around_ND: np.ndarray
    precision_DD: np.ndarray
    norms_N: np.ndarray


@traits("relative")
class Discriminant(DeclaredKey):
    """The cosine of the query's mean with an adapter's, both around the mean of all and whitened within adapters.

    `shrinkage`, 0 to 1, draws the covariance towards a multiple of the identity: few samples know few directions.
    """

    def __init__(self, *, shrinkage: Share = 0.5) -> None:
        self.shrinkage = shrinkage
        self._last: tuple[list[Record], KeySpace, _Whitened] | None = None

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        scores_N = np.full(len(records), np.nan)
        # in one order, since every query brings the same adapters in another
        rows = sorted(range(len(records)), key=lambda row: records[row].name)
        sampled = [row for row in rows if len(space.samples(records[row]))]
        if not query.inputs or not sampled:
            return scores_N
        whitened = self._fit([records[row] for row in sampled], space)
        query_D = space.embed(query.inputs).mean(axis=0) - whitened.centre_D
        norms_N = whitened.norms_N * np.sqrt(query_D @ whitened.precision_DD @ query_D)
        # the only adapter is the centre itself: it lies in no direction
        scores_N[sampled] = whitened.around_ND @ whitened.precision_DD @ query_D / np.where(norms_N > 1e-12, norms_N, np.inf)
        return scores_N

    def _fit(self, records: list[Record], space: KeySpace) -> _Whitened:
        """Return the records' means and covariance, kept because search after search meets the same adapters."""
        last = self._last
        if last is not None and last[1] is space and last[0] == records:
            return last[2]
        samples = [space.samples(record) for record in records]
        means_ND = np.stack([rows_MD.mean(axis=0) for rows_MD in samples])
        precision_DD = np.linalg.inv(self._covariance(samples))
        around_ND = means_ND - means_ND.mean(axis=0)
        norms_N = np.sqrt(np.einsum("nd,nd->n", around_ND @ precision_DD, around_ND))
        whitened = _Whitened(means_ND.mean(axis=0), around_ND, precision_DD, norms_N)
        # one assignment, so that threads see the old or the new
        self._last = (records, space, whitened)
        return whitened

    def _covariance(self, samples: list[np.ndarray]) -> np.ndarray:
        chosen = samples[:: -(-len(samples) // MAX_ADAPTERS)]
        residuals_MD = np.concatenate([rows_MD - rows_MD.mean(axis=0) for rows_MD in chosen])
        covariance_DD = residuals_MD.T @ residuals_MD / max(1, len(residuals_MD) - len(chosen))
        size = len(covariance_DD)
        # adapters of one sample each show no variation at all: then all directions are alike
        level = float(np.trace(covariance_DD)) / size or 1.0
        shrunk: np.ndarray = (1 - self.shrinkage) * covariance_DD + self.shrinkage * level * np.eye(size)
        return shrunk
