"""The parts that all indexes share: checks of vectors, the one score that all report, and exact results.

An inexact scan gives exact results: its best rows are scored again, until no other row can be among them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np

import loraweave.registry as registry
from loraweave.errors import DimensionMismatch

# fp32 embeddings of one text differ from batch to batch by some 1e-7; such noise must not decide the order of equals
SCORE_DECIMALS = 6

# how many numbers are widened to float64 at a time: 32 MB
_BLOCK_NUMBERS = 2**22

# arrays of up to this size, some 64 queries, are checked number by number
_FEW_NUMBERS = 2**16

Ranking = tuple[np.ndarray, np.ndarray]

# returns the index class for this many keys
Choice = Callable[[int], Any]

# from this many keys on "auto" takes an approximate index (benchmarks/hub.py)
MIN_APPROXIMATE = 200_000


class Index(Protocol):
    """A search of the k largest inner products of each query (all for a larger k): scores descending, ties by position.

    A mask leaves only the rows that it allows. `arrays` returns the arrays of which `from_arrays` makes an index without a
    copy; from "vectors" alone, which is always there, `from_arrays` makes the rest.
    """

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Index: ...

    def arrays(self) -> dict[str, np.ndarray]: ...

    def __len__(self) -> int: ...

    def add(self, vectors_ND: np.ndarray) -> None: ...

    def search(
        self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


def index_choice(index: str) -> Choice:
    """Return the class of that name; "auto" chooses by the number of keys and the presence of faiss. Raises UnknownName."""
    if index != "auto":
        kind = registry.get("indexes", index)
        return lambda count: kind
    if not importlib.util.find_spec("faiss"):
        return lambda count: registry.get("indexes", "flat")
    return lambda count: registry.get("indexes", "faiss_half" if count < MIN_APPROXIMATE else "faiss_ivf")


def check_vectors(vectors_ND: np.ndarray, dim: int, what: str) -> np.ndarray:
    """Return the vectors as contiguous fp32 (N, dim). Raises DimensionMismatch for another size or values not finite."""
    array = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise DimensionMismatch(f"{what} have shape {array.shape}, but the index holds vectors of {dim} numbers: (N, {dim})")
    if array.size <= _FEW_NUMBERS and np.isfinite(array).all():
        return array
    # a sum over a row is finite only if each of its numbers is, so that few rows need a closer look
    with np.errstate(invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(array.sum(axis=1, dtype=np.float64)))
    bad = suspects[~np.isfinite(array[suspects]).all(axis=1)]
    if bad.size:
        raise DimensionMismatch(f"{what} {bad[:3].tolist()} of {len(array)} hold NaN or infinite values")
    return array


def check_mask(allowed_N: np.ndarray | None, count: int) -> np.ndarray | None:
    """Return the mask as booleans (N,), or None if it allows everything. Raises DimensionMismatch for another length."""
    if allowed_N is None:
        return None
    mask_N = np.ascontiguousarray(allowed_N, dtype=bool)
    if mask_N.shape != (count,):
        raise DimensionMismatch(f"the mask has shape {mask_N.shape}, but the index holds {count} vectors: ({count},)")
    return None if mask_N.all() else mask_N


def saved_array(arrays: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return a saved array, not copied. Raises ValueError if it is absent or has another dtype or shape (None: any size)."""
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"the saved index has no array {name!r}, only {sorted(arrays)}")
    fits = len(array.shape) == len(shape) and all(w is None or w == s for w, s in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        raise ValueError(f"array {name!r} of the saved index is {array.dtype} {array.shape}, not {dtype} {shape}")
    return array


def rank(query_D: np.ndarray, vectors_ND: np.ndarray, k: int) -> Ranking:
    """Return the k largest inner products and their rows: scores (K,) fp32 descending, ties by row.

    Products run in float64, so that the result depends on neither the order of summation nor the kernel.
    """
    scores_N = _score(query_D, vectors_ND)
    # stable: equal scores keep the order of addition
    rows_K = np.argsort(-scores_N, kind="stable")[:k]
    return scores_N[rows_K].astype(np.float32), rows_K


def rescore(query_QD: np.ndarray, vectors_ND: np.ndarray, positions_QR: np.ndarray, k: int) -> Ranking:
    """Return the k best of each query's R positions by the score of `rank`: scores (Q, K) descending and positions."""
    positions_QR = np.sort(positions_QR, axis=1)
    scores_QR = np.empty(positions_QR.shape)
    step = max(1, _BLOCK_NUMBERS // max(1, positions_QR.shape[1] * vectors_ND.shape[1]))
    for start in range(0, len(query_QD), step):
        part = slice(start, start + step)
        if step > 1:
            near_QRD = vectors_ND[positions_QR[part]].astype(np.float64)
            scores_QR[part] = np.matmul(near_QRD, query_QD[part].astype(np.float64)[:, :, None])[:, :, 0]
        else:
            scores_QR[start] = _score(query_QD[start], vectors_ND, positions_QR[start])
    scores_QR = np.round(scores_QR, SCORE_DECIMALS)
    order_QK = np.argsort(-scores_QR, axis=1, kind="stable")[:, :k]
    # plain indexing, since take_along_axis takes as long as the scoring
    rows_Q1 = np.arange(len(query_QD))[:, None]
    return scores_QR[rows_Q1, order_QK].astype(np.float32), positions_QR[rows_Q1, order_QK]


def _score(query_D: np.ndarray, vectors_ND: np.ndarray, positions_R: np.ndarray | None = None) -> np.ndarray:
    """Return the scores of all rows, or of those at the positions, to six decimals, in float64, block by block."""
    count = len(vectors_ND) if positions_R is None else len(positions_R)
    query_D, scores_N = query_D.astype(np.float64), np.empty(count)
    step = max(1, _BLOCK_NUMBERS // vectors_ND.shape[1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        rows_BD = vectors_ND[part] if positions_R is None else vectors_ND[positions_R[part]]
        scores_N[part] = rows_BD.astype(np.float64) @ query_D
    return np.round(scores_N, SCORE_DECIMALS)


# an unsure scan is repeated with this many times more rows
_GROWTH = 8

# below this share of allowed rows, scoring just these costs less than a scan that skips the others
FEW_ALLOWED = 1 / 16

# the number of rows in one matrix product: 64 queries x 4096 rows x 4 bytes stay in the second cache
_BLOCK_ROWS = 4096

Scan = Callable[[np.ndarray, int], Ranking]


def exact_best(
    scan: Scan, query_QD: np.ndarray, vectors_ND: np.ndarray, k: int, num_first: int, slack_Q: np.ndarray
) -> Ranking:
    """Return the k best rows of each query, as the reference ranks them: scores (Q, K) and positions, ties by position.

    `scan(query_QD, r)` returns the r rows, or all there are, with the largest products, each at most `slack_Q` off, in any
    order. It is called with `num_first`, and with more while the k-th best score is so near the worst one returned that a
    row left out could be better.
    """
    num_asked = max(k, num_first)
    nearly_QR, rows_QR = scan(query_QD, num_asked)
    scores_QK, positions_QK = rescore(query_QD, vectors_ND, rows_QR, k)
    unsure_Q = np.arange(len(query_QD))
    some_QK = scores_QK
    # a scan that returns fewer rows than it was asked for has returned all
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
    """An index's vectors of `dim` numbers in order of addition, and the parts of a search that all such indexes share.

    A subclass finds in `_best` the k best of `count` rows, which are all or those that a mask allows, indexes new rows in
    `_append`, and in `_load` takes up saved arrays beside the vectors.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._vectors_ND = np.empty((0, dim), np.float32)

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the index of the arrays that `arrays` returned, searched in place; with vectors alone the rest is made.

        Raises ValueError for arrays of another form.
        """
        index = cls(dim)
        index._vectors_ND = saved_array(arrays, "vectors", "<f4", (None, dim))
        if set(arrays) == {"vectors"}:
            index._append(index._vectors_ND)
        else:
            index._load(arrays)
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        return {"vectors": self._vectors_ND}

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def add(self, vectors_ND: np.ndarray) -> None:
        """Append vectors (N, dim). Raises DimensionMismatch for another size or values not finite."""
        new_ND = check_vectors(vectors_ND, self.dim, "vectors")
        self._vectors_ND = np.concatenate([self._vectors_ND, new_ND])
        self._append(new_ND)

    def search(self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None) -> Ranking:
        """Return scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), ties by position.

        K is the smaller of k and the number of vectors, or of those that the mask allows. If those are few, each is scored.
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
    """Return the `num` largest fp32 products of each query and their rows, in no order, by a matrix product per block.

    A block's products are compared with the worst score kept so far, which few reach: so most are looked at only once.
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
