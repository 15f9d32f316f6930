"""Exact search by inner product in numpy: the reference for every other index."""

from __future__ import annotations

import numpy as np

from loraweave.retrieval.indexes._vectors import checked, ranked


class Flat:
    """Vectors of `dim` numbers in order of addition."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._vectors_ND = np.empty((0, dim), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def add(self, vectors_ND: np.ndarray) -> None:
        """Appends vectors (N, dim). DimensionMismatch for another size, or values that are not finite."""
        self._vectors_ND = np.concatenate([self._vectors_ND, checked(vectors_ND, self.dim, "vectors")])

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), K = min(k, len); ties by position."""
        query_QD = checked(query_QD, self.dim, "queries")
        num_found = min(k, len(self))
        scores_QK = np.empty((len(query_QD), num_found), dtype=np.float32)
        positions_QK = np.empty((len(query_QD), num_found), dtype=np.int64)
        for row, query_D in enumerate(query_QD):
            scores_QK[row], positions_QK[row] = ranked(query_D, self._vectors_ND, num_found)
        return scores_QK, positions_QK
