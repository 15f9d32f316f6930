"""Exact search by inner product with faiss on fp32 vectors, several times faster than numpy on many keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from loraweave.extend import Flat
from loraweave.extensions.large_hubs.indexes._faiss import Ranking, exact_best, import_faiss, scan_products, selector

# how far an fp32 product of unit vectors can be from the rounded float64 score, with a margin
SLACK = 1e-5

# from this many queries on, one matrix product a block is faster than faiss row by row
MANY_QUERIES = 8

# how many rows are asked for beyond k, so that the k-th is seldom a near tie with the last
SPARE = 6


class FaissFlat(Flat):
    """Vectors of `dim` numbers in order of addition. Raises PackageMissing without faiss.

    faiss leaves the order of ties open and its fp32 products depend on the kernel. So it only narrows the choice: rows near
    the k-th score are scored again as the reference does, and the results are the reference's.
    """

    exact = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._faiss: Any = import_faiss("faiss_flat")
        self._largest_norm = 1.0

    def _append(self, new_ND: np.ndarray) -> None:
        self._largest_norm = max(self._largest_norm, largest_norm(new_ND))

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        slack_Q = SLACK * np.maximum(1.0, np.linalg.norm(query_QD, axis=1)) * self._largest_norm
        faiss, pointer = self._faiss, self._faiss.swig_ptr
        allowed = None if mask_N is None else selector(faiss, mask_N)

        def scan(some_QD: np.ndarray, num: int) -> Ranking:
            if len(some_QD) >= MANY_QUERIES:
                return scan_products(self._vectors_ND, mask_N, some_QD, num)
            shape = len(some_QD), min(num, count)
            best_QR, rows_QR = np.empty(shape, np.float32), np.empty(shape, np.int64)
            data = pointer(some_QD), pointer(self._vectors_ND), self.dim, len(some_QD), len(self)
            faiss.knn_inner_product(*data, shape[1], pointer(best_QR), pointer(rows_QR), allowed)
            return best_QR, rows_QR

        return exact_best(scan, query_QD, self._vectors_ND, k, k + SPARE, slack_Q)


def largest_norm(vectors_ND: np.ndarray) -> float:
    """Return the largest norm of a row, at least 1."""
    # row sums of squares without a copy of the array, which may be a mapped file larger than the memory
    return float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND).max(initial=1.0)))
