"""Exact results from a scan that is only nearly exact: its best rows are scored again, until no other can be among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np

from loraweave.hub.indexes._vectors import Ranking, check_mask, check_vectors, rescore, saved_array

# a scan that was not sure asks for so many times more
_GROWTH = 8

# below this share of allowed rows, scoring just these costs less than a scan that passes over the others
FEW_ALLOWED = 1 / 16

# rows whose products are taken at once: 64 queries x 4096 rows x 4 bytes stay in the second cache
_BLOCK_ROWS = 4096

Scan = Callable[[np.ndarray, int], Ranking]


def exact_best(
    scan: Scan, query_QD: np.ndarray, vectors_ND: np.ndarray, k: int, num_first: int, slack_Q: np.ndarray
) -> Ranking:
    """The k best rows of each query, as the reference ranks them: scores (Q, K) and positions, ties by position.

    `scan(query_QD, r)` gives the r rows, or all there are, with the largest products, each at most `slack_Q` off, in any
    order. It is asked for `num_first`, and for more while the k-th best score is so near the worst one it gave that a row
    left out could be better.
    """
    num_asked = max(k, num_first)
    nearly_QR, rows_QR = scan(query_QD, num_asked)
    scores_QK, positions_QK = rescore(query_QD, vectors_ND, rows_QR, k)
    unsure_Q = np.arange(len(query_QD))
    some_QK = scores_QK
    # a scan that gives less than it was asked for has given all
    while nearly_QR.shape[1] == num_asked:
        unsure_Q = unsure_Q[some_QK[:, -1] <= nearly_QR.min(axis=1) + slack_Q[unsure_Q]]
        if not len(unsure_Q):
            break
        num_asked *= _GROWTH
        nearly_QR, rows_QR = scan(query_QD[unsure_Q], num_asked)
        some_QK, positions_QK[unsure_Q] = rescore(query_QD[unsure_Q], vectors_ND, rows_QR, k)
        scores_QK[unsure_Q] = some_QK
    return scores_QK, positions_QK


class HeldVectors:
    """An index's vectors of `dim` numbers in order of addition, and the search of those that have a faster one for many.

    An index says in `_best` how it finds the k best of `count` rows, which are all or those that a mask allows, in `_append`
    what it makes of new rows, and in `_load` how it takes up saved arrays beside the vectors.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._vectors_ND = np.empty((0, dim), np.float32)

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Self:
        """The index of what `arrays` gave, searched in place; with vectors alone the rest is made.

        ValueError for arrays of another form.
        """
        index = cls(dim)
        index._vectors_ND = saved_array(arrays, "vectors", "<f4", (None, dim))
        if set(arrays) == {"vectors"}:
            index._append(index._vectors_ND)
        else:
            index._load(arrays)
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """What is to be saved."""
        return {"vectors": self._vectors_ND}

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def add(self, vectors_ND: np.ndarray) -> None:
        """Appends vectors (N, dim). DimensionMismatch for another size, or values that are not finite."""
        new_ND = check_vectors(vectors_ND, self.dim, "vectors")
        self._vectors_ND = np.concatenate([self._vectors_ND, new_ND])
        self._append(new_ND)

    def search(self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None) -> Ranking:
        """Scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), ties by position.

        K is the smaller of k and the number of vectors, or of those that the mask allows. Where the mask leaves few rows,
        each is scored.
        """
        query_QD = check_vectors(query_QD, self.dim, "queries")
        mask_N = check_mask(allowed_N, len(self))
        count = len(self) if mask_N is None else int(mask_N.sum())
        shape = (len(query_QD), min(k, count))
        if not all(shape):
            return np.empty(shape, np.float32), np.empty(shape, np.int64)
        if mask_N is not None and count < FEW_ALLOWED * len(self):
            rows_R = np.flatnonzero(mask_N)
            return rescore(query_QD, self._vectors_ND, np.broadcast_to(rows_R, (len(query_QD), len(rows_R))), k)
        return self._best(query_QD, shape[1], mask_N, count)

    def _append(self, new_ND: np.ndarray) -> None:
        return

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        raise ValueError(f"the saved index has the arrays {sorted(arrays)}, of which this kind has 'vectors' alone")

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        raise NotImplementedError


def scan_products(vectors_ND: np.ndarray, allowed_N: np.ndarray | None, query_QD: np.ndarray, num: int) -> Ranking:
    """The `num` largest fp32 products of each query and their rows, in no order; block by block, a matrix product each.

    A block's products are compared with the worst score kept so far, which few reach: so most are looked at once only.
    """
    num = min(num, len(vectors_ND) if allowed_N is None else int(allowed_N.sum()))
    best_QR = np.full((len(query_QD), num), -np.inf, np.float32)
    rows_QR = np.full((len(query_QD), num), -1, np.int64)
    for start in range(0, len(vectors_ND) if num else 0, _BLOCK_ROWS):
        products_QB = query_QD @ vectors_ND[start : start + _BLOCK_ROWS].T
        if allowed_N is not None:
            products_QB[:, ~allowed_N[start : start + _BLOCK_ROWS]] = -np.inf
        above_QB = products_QB > best_QR.min(axis=1)[:, None]
        for query in np.flatnonzero(above_QB.any(axis=1)):
            new = np.flatnonzero(above_QB[query])
            scores = np.concatenate([best_QR[query], products_QB[query, new]])
            rows = np.concatenate([rows_QR[query], new + start])
            kept = np.argpartition(-scores, num - 1)[:num]
            best_QR[query], rows_QR[query] = scores[kept], rows[kept]
    return best_QR, rows_QR
