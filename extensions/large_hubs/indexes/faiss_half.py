"""Exact search by inner product that scans fp16 copies with faiss and scores the best again: half the bytes of fp32."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from loraweave.extend.hubs import Flat, saved_array
from loraweave.extensions.large_hubs.indexes._faiss import (
    HalfScanners,
    Ranking,
    exact_best,
    from_keys,
    import_faiss,
    scan_products,
)

# how far an fp32 product of unit vectors can be from the rounded float64 score, with a margin
SLACK = 1e-5

# from this many queries on, one matrix product a block is faster than faiss row by row
MANY_QUERIES = 8

# rows taken from these products beyond k, so that the k-th is seldom a near tie with the last
SPARE = 6

# how many rows are scored again: the k-th is then nearly always further from the last than fp16's rounding
NUM_RESCORED = 50

# how many rows are rounded at a time
_BLOCK_ROWS = 2**10

# fp16's largest number: beyond it a code would be infinite
_LARGEST = 65504.0


class FaissHalf(Flat):
    """An index of vectors of `dim` numbers in order of addition. Raises PackageMissing without faiss.

    Results are the reference's: a bound on every row's distance to its fp16 copy shows whether a row that was not scored
    again could be among the best; if so, more rows are scored. Many queries at once are matrix products in fp32.
    """

    exact = True
    default_from = from_keys(0)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._scanners = HalfScanners(import_faiss("faiss_half"), dim, numbered=False)
        self._codes_ND = np.empty((0, dim), np.float16)
        # the largest norm of a row, and the largest distance of a row to its code
        self._bounds = np.array([1.0, 0.0], np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return {name: array} of all arrays that an index file needs."""
        return {"vectors": self._vectors_ND, "codes": self._codes_ND, "bounds": self._bounds}

    def _append(self, new_ND: np.ndarray) -> None:
        codes_ND, bounds = halve(new_ND)
        self._bounds = np.maximum(self._bounds, bounds)
        self._codes_ND = np.concatenate([self._codes_ND, codes_ND]) if len(self._codes_ND) else codes_ND

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._codes_ND = saved_array(arrays, "codes", "<f2", self._vectors_ND.shape)
        self._bounds = saved_array(arrays, "bounds", "<f4", (2,))

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        norm_Q = np.maximum(1.0, np.sqrt(np.einsum("qd,qd->q", query_QD, query_QD)))
        largest, distance = self._bounds.tolist()
        if len(query_QD) >= MANY_QUERIES:
            products = partial(scan_products, self._vectors_ND, mask_N)
            return exact_best(products, query_QD, self._vectors_ND, k, k + SPARE, SLACK * norm_Q * largest)
        scanner = self._scanners.get(mask_N)

        def halves(some_QD: np.ndarray, num: int) -> Ranking:
            rankings = [scanner.best(query_D, [(self._codes_ND, None)], min(num, count)) for query_D in some_QD]
            return np.stack([scores_R for scores_R, _ in rankings]), np.stack([rows_R for _, rows_R in rankings])

        slack_Q = norm_Q * (SLACK * largest + distance)
        return exact_best(halves, query_QD, self._vectors_ND, k, max(NUM_RESCORED, 2 * k), slack_Q)


def codes(vectors_ND: np.ndarray) -> np.ndarray:
    """Return fp16 copies of the rows."""
    made: np.ndarray = np.clip(vectors_ND, -_LARGEST, _LARGEST).astype(np.float16)
    return made


def halve(vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return fp16 copies of the rows, and (the largest norm, at least 1; the largest distance of a row to its copy)."""
    codes_ND = np.empty(vectors_ND.shape, np.float16)
    distance = 0.0
    for start in range(0, len(vectors_ND), _BLOCK_ROWS):
        rows_BD = vectors_ND[start : start + _BLOCK_ROWS]
        codes_ND[start : start + _BLOCK_ROWS] = codes(rows_BD)
        lost_BD = rows_BD - codes_ND[start : start + _BLOCK_ROWS]
        distance = max(distance, float(np.sqrt(np.einsum("nd,nd->n", lost_BD, lost_BD).max())))
    # row sums of squares without a copy of the array, which may be a mapped file larger than the memory
    largest = float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND).max(initial=1.0)))
    # a margin for the rounding of these very sums
    return codes_ND, np.array([largest, distance * 1.01], np.float32)
