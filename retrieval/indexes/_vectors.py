"""What every index does to vectors: the check at its door, and the one score that all of them report."""

from __future__ import annotations

import numpy as np

from loraweave.errors import DimensionMismatch

# fp32 embeddings of one text differ from batch to batch by some 1e-7; such noise must not decide the order of equals
SCORE_DECIMALS = 6


def checked(vectors_ND: np.ndarray, dim: int, what: str) -> np.ndarray:
    """The vectors as a contiguous fp32 (N, dim) array. DimensionMismatch for another size, or values that are not finite."""
    array = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise DimensionMismatch(f"{what} have shape {array.shape}, but the index holds vectors of {dim} numbers: (N, {dim})")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise DimensionMismatch(f"{what} {bad[:3].tolist()} of {len(array)} hold NaN or infinite values")
    return array


def ranked(query_D: np.ndarray, vectors_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest inner products and their rows: scores (K,) fp32 descending, ties by row.

    Products run in float64, so that the result depends on neither the order of summation nor the kernel.
    """
    scores_N = np.round(vectors_ND.astype(np.float64) @ query_D.astype(np.float64), SCORE_DECIMALS)
    # stable: equal scores keep the order of addition
    rows_K = np.argsort(-scores_N, kind="stable")[:k]
    return scores_N[rows_K].astype(np.float32), rows_K
