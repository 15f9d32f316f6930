"""Several prototypes an adapter, the centres of its sample inputs by spherical k-means; the nearest one counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraweave import Record
from loraweave.extend import Count, KeySpace, Query
from loraweave.extensions.retrieval_keys.keys._declared import DeclaredKey

_MAX_ROUNDS = 20


class Prototypes(DeclaredKey):
    """The mean cosine with the nearest of at most `count` prototypes, 1 or more: for adapters of several kinds of input."""

    def __init__(self, *, count: Count = 3) -> None:
        self.count = count

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        query_QD = space.embed(query.inputs)
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            centres_KD = space.once(f"prototypes {self.count}", record, lambda r: centres(space.samples(r), self.count))
            if len(query_QD) and len(centres_KD):
                scores_N[row] = (query_QD @ centres_KD.T).max(axis=1).mean()
        return scores_N


def centres(samples_MD: np.ndarray, count: int) -> np.ndarray:
    """Return unit vectors (K, D), K <= count, by k-means from the sample nearest to the mean and those farthest off."""
    if not len(samples_MD):
        return samples_MD
    chosen = [int(np.argmax(samples_MD @ samples_MD.mean(axis=0)))]
    while len(chosen) < min(count, len(samples_MD)):
        nearest_M = (samples_MD @ samples_MD[chosen].T).max(axis=1)
        farthest = int(np.argmin(nearest_M))
        # the rest repeats what is chosen
        if nearest_M[farthest] > 1 - 1e-6:
            break
        chosen.append(farthest)
    centres_KD = samples_MD[chosen]
    owner_M = np.full(len(samples_MD), -1)
    for _ in range(_MAX_ROUNDS):
        nearest_M = np.argmax(samples_MD @ centres_KD.T, axis=1)
        if np.array_equal(nearest_M, owner_M):
            break
        owner_M = nearest_M
        for centre in np.unique(owner_M):
            mean_D = samples_MD[owner_M == centre].mean(axis=0)
            # opposite samples leave no direction; the centre then stays where it is
            if (norm := float(np.linalg.norm(mean_D))) > 1e-9:
                centres_KD[centre] = mean_D / norm
    return centres_KD
