"""Exact search by inner product in numpy: the reference for every other index."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loraweave.hub.indexes._exact import HeldVectors
from loraweave.hub.indexes._vectors import Ranking, check_mask, check_vectors, rank, saved_array


class Flat(HeldVectors):
    """Vectors of `dim` numbers in order of addition, each compared with the query."""

    exact = True

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Flat:
        """The index of what `arrays` gave, searched in place. ValueError for arrays of another form."""
        index = cls(dim)
        index._vectors_ND = saved_array(arrays, "vectors", "<f4", (None, dim))
        return index

    def search(self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None) -> Ranking:
        """Scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), ties by position.

        K is the smaller of k and the number of vectors, or of those that the mask allows.
        """
        query_QD = check_vectors(query_QD, self.dim, "queries")
        mask_N = check_mask(allowed_N, len(self))
        rows_R = np.arange(len(self)) if mask_N is None else np.flatnonzero(mask_N)
        vectors_RD = self._vectors_ND if mask_N is None else self._vectors_ND[rows_R]
        num_found = min(k, len(rows_R))
        scores_QK = np.empty((len(query_QD), num_found), dtype=np.float32)
        positions_QK = np.empty((len(query_QD), num_found), dtype=np.int64)
        for number, query_D in enumerate(query_QD):
            scores_QK[number], order_K = rank(query_D, vectors_RD, num_found)
            positions_QK[number] = rows_R[order_K]
        return scores_QK, positions_QK
