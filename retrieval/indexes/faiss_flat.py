"""Exact search by inner product with faiss (IndexFlatIP), several times faster than numpy on many keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from loraweave.errors import PackageMissing
from loraweave.retrieval.indexes._vectors import checked, ranked

# how far an fp32 product of unit vectors can be from the rounded float64 one that decides, with a margin
_SLACK = 1e-5


class FaissFlat:
    """Vectors of `dim` numbers in order of addition. PackageMissing without faiss.

    faiss leaves the order of ties open and answers with position -1 when k exceeds the count. So it only narrows the
    choice: everything near the k-th score is scored again as the reference does, and the results are the reference's.
    Nothing is saved: the catalogue is the truth, and reading an index file that someone changed is not safe in faiss.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._index = _faiss().IndexFlatIP(dim)
        self._largest_norm = 1.0

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors_ND: np.ndarray) -> None:
        """Appends vectors (N, dim). DimensionMismatch for another size, or values that are not finite."""
        vectors_ND = checked(vectors_ND, self.dim, "vectors")
        if len(vectors_ND):
            self._largest_norm = max(self._largest_norm, float(np.linalg.norm(vectors_ND, axis=1).max()))
            self._index.add(vectors_ND)

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), K = min(k, len); ties by position."""
        query_QD = checked(query_QD, self.dim, "queries")
        num_found = min(k, len(self))
        scores_QK = np.empty((len(query_QD), num_found), dtype=np.float32)
        positions_QK = np.empty((len(query_QD), num_found), dtype=np.int64)
        if not num_found or not len(query_QD):
            return scores_QK, positions_QK
        kth_Q = self._index.search(query_QD, num_found)[0][:, -1]
        for row, query_D in enumerate(query_QD):
            slack = _SLACK * max(1.0, float(np.linalg.norm(query_D))) * self._largest_norm
            near = np.sort(self._index.range_search(query_D[None], float(kth_Q[row]) - slack)[2])
            scores_QK[row], order = ranked(query_D, self._index.reconstruct_batch(near), num_found)
            positions_QK[row] = near[order]
        return scores_QK, positions_QK


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise PackageMissing(
            "the index 'faiss_flat' needs faiss: pip install 'faiss-cpu>=1.15' (or index='flat', which needs only numpy)"
        ) from error
    return faiss
