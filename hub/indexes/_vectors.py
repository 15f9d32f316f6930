"""What every index does to vectors: the checks at its door, and the one score that all of them report."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

import loraweave.registry as registry
from loraweave.errors import DimensionMismatch

# fp32 embeddings of one text differ from batch to batch by some 1e-7; such noise must not decide the order of equals
SCORE_DECIMALS = 6

# numbers that are widened to float64 at a time: 32 MB
_BLOCK_NUMBERS = 2**22

# the size of some 64 queries
_FEW_NUMBERS = 2**16

Ranking = tuple[np.ndarray, np.ndarray]

# an index class for so many keys
Choice = Callable[[int], Any]

# from so many keys on "auto" takes an approximate index (benchmarks/hub.py)
MIN_APPROXIMATE = 200_000


class Index(Protocol):
    """The k largest inner products of each query: scores descending, ties by position; k above the count gives all.

    A mask leaves only the rows that it allows. `arrays` is what `from_arrays` makes an index from without copying it; of
    "vectors" alone, which is always there, it makes the rest.
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
    """The class of that name; "auto" chooses by the number of keys and by whether faiss is installed. UnknownName."""
    if index != "auto":
        kind = registry.get("indexes", index)
        return lambda count: kind
    if not importlib.util.find_spec("faiss"):
        return lambda count: registry.get("indexes", "flat")
    return lambda count: registry.get("indexes", "faiss_half" if count < MIN_APPROXIMATE else "faiss_ivf")


def check_vectors(vectors_ND: np.ndarray, dim: int, what: str) -> np.ndarray:
    """The vectors as a contiguous fp32 (N, dim) array. DimensionMismatch for another size, or values that are not finite."""
    array = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise DimensionMismatch(f"{what} have shape {array.shape}, but the index holds vectors of {dim} numbers: (N, {dim})")
    if array.size <= _FEW_NUMBERS and np.isfinite(array).all():
        return array
    # a sum over a row is finite only if each of its numbers is, so few rows are looked at closely
    with np.errstate(invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(array.sum(axis=1, dtype=np.float64)))
    bad = suspects[~np.isfinite(array[suspects]).all(axis=1)]
    if bad.size:
        raise DimensionMismatch(f"{what} {bad[:3].tolist()} of {len(array)} hold NaN or infinite values")
    return array


def check_mask(allowed_N: np.ndarray | None, count: int) -> np.ndarray | None:
    """The mask as booleans (N,), or None when it allows everything. DimensionMismatch for another length."""
    if allowed_N is None:
        return None
    mask_N = np.ascontiguousarray(allowed_N, dtype=bool)
    if mask_N.shape != (count,):
        raise DimensionMismatch(f"the mask has shape {mask_N.shape}, but the index holds {count} vectors: ({count},)")
    return None if mask_N.all() else mask_N


def saved_array(arrays: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A saved array as it is, not copied. ValueError when it is absent, or of another dtype or shape; None fits any size."""
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"the saved index has no array {name!r}, only {sorted(arrays)}")
    fits = len(array.shape) == len(shape) and all(w is None or w == s for w, s in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        raise ValueError(f"array {name!r} of the saved index is {array.dtype} {array.shape}, not {dtype} {shape}")
    return array


def rank(query_D: np.ndarray, vectors_ND: np.ndarray, k: int) -> Ranking:
    """The k largest inner products and their rows: scores (K,) fp32 descending, ties by row.

    Products run in float64, so that the result depends on neither the order of summation nor the kernel.
    """
    scores_N = _score(query_D, vectors_ND)
    # stable: equal scores keep the order of addition
    rows_K = np.argsort(-scores_N, kind="stable")[:k]
    return scores_N[rows_K].astype(np.float32), rows_K


def rescore(query_QD: np.ndarray, vectors_ND: np.ndarray, positions_QR: np.ndarray, k: int) -> Ranking:
    """Of each query's R positions the k best by the score of `ranked`: scores (Q, K) descending and positions."""
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
    """Scores of all rows, or of those at the positions, to six decimals, widened to float64 block by block."""
    count = len(vectors_ND) if positions_R is None else len(positions_R)
    query_D, scores_N = query_D.astype(np.float64), np.empty(count)
    step = max(1, _BLOCK_NUMBERS // vectors_ND.shape[1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        rows_BD = vectors_ND[part] if positions_R is None else vectors_ND[positions_R[part]]
        scores_N[part] = rows_BD.astype(np.float64) @ query_D
    rounded: np.ndarray = np.round(scores_N, SCORE_DECIMALS)
    return rounded
