"""Exact search by inner product in numpy: the reference for every other index."""

from __future__ import annotations

import numpy as np

from loraweave.hub.indexes._vectors import HeldVectors, Ranking, rank


class Flat(HeldVectors):
    """Vectors of `dim` numbers in order of addition, each compared with the query."""

    exact = True

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        rows_R = np.arange(count) if mask_N is None else np.flatnonzero(mask_N)
        vectors_RD = self._vectors_ND if mask_N is None else self._vectors_ND[rows_R]
        rankings = [rank(query_D, vectors_RD, k) for query_D in query_QD]
        return np.stack([scores_K for scores_K, _ in rankings]), rows_R[np.stack([order_K for _, order_K in rankings])]
