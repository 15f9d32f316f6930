"""Exact search by inner product in numpy: the reference for every other index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import numpy as np

import loraweave.registry as registry
from loraweave.errors import DimensionMismatch

# fp32 embeddings of one text differ from batch to batch by some 1e-7; such noise must not decide the order of equals
SCORE_DECIMALS = 6

# how many numbers are widened to float64 at a time: 32 MB
_BLOCK_NUMBERS = 2**22

# arrays of up to this size, some 64 queries, are checked number by number
_FEW_NUMBERS = 2**16

# fewer keys, which are compared within a millisecond, are worth neither another index's import nor a file
FEW_KEYS = 1000

# below this share of allowed rows, scoring just these costs less than a scan that skips the others
_FEW_ALLOWED = 1 / 16

Ranking = tuple[np.ndarray, np.ndarray]


class Index(Protocol):
    """An index of vectors, which finds the k largest inner products of each query: scores descending, ties by position.

    A mask restricts a search to the rows where it is True. `from_arrays` makes an index, without a copy, of the arrays that
    `arrays` returned, or of "vectors" alone, which are always among them. If no index is named, the class with the largest
    `default_from` that the number of keys reaches is used; fewer than FEW_KEYS are searched by `Flat`.
    """

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Index: ...

    def arrays(self) -> dict[str, np.ndarray]: ...

    def __len__(self) -> int: ...

    def add(self, vectors_ND: np.ndarray) -> None: ...

    def search(self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None) -> Ranking: ...


# maps the number of keys to the index class for it
Choice = Callable[[int], Any]


def index_choice(index: str) -> Choice:
    """Return a function (number of keys) -> index class: the named one, or for "auto" one that fits. Raises UnknownName."""
    if index == "auto":
        return _kind_for
    kind = registry.get("indexes", index)
    return lambda count: kind


def _kind_for(count: int) -> Any:
    if count < FEW_KEYS:
        return Flat
    kinds = [registry.get("indexes", name) for name in registry.names("indexes")]
    reached = [kind for kind in kinds if (least := getattr(kind, "default_from", None)) is not None and least <= count]
    return max(reached, key=lambda kind: kind.default_from, default=Flat)


class Flat:
    """An exact index: vectors of `dim` numbers in order of addition, each of which is compared with the query.

    A subclass overrides `_best` (return the k best of the `count` rows that the mask allows), `_append` (index new rows) and
    `_load` (take the saved arrays other than the vectors).
    """

    exact = True
    decimals = SCORE_DECIMALS
    default_from: ClassVar[int | None] = None

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._vectors_ND = np.empty((0, dim), np.float32)

    @classmethod
    def from_arrays(cls, dim: int, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return an index of the arrays that `arrays` returned, not copied; from "vectors" alone, build the other arrays.

        Raises ValueError if an array is missing or has another dtype or shape.
        """
        index = cls(dim)
        index._vectors_ND = saved_array(arrays, "vectors", "<f4", (None, dim))
        if set(arrays) == {"vectors"}:
            index._append(index._vectors_ND)
        else:
            index._load(arrays)
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save by name; "vectors" (N, dim) is always among them."""
        return {"vectors": self._vectors_ND}

    def __len__(self) -> int:
        return len(self._vectors_ND)

    def add(self, vectors_ND: np.ndarray) -> None:
        """Append vectors (N, dim). Raises DimensionMismatch for another size or values not finite."""
        new_ND = _checked(vectors_ND, self.dim, "vectors")
        self._vectors_ND = np.concatenate([self._vectors_ND, new_ND])
        self._append(new_ND)

    def search(self, query_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None) -> Ranking:
        """Return scores (Q, K) descending, rounded to 6 decimals, and positions (Q, K), ties by position.

        K is the smaller of k and the number of vectors, or of those that the mask allows. If those are few, each is scored.
        Raises DimensionMismatch for queries of another size or values not finite, and for a mask of another length.
        """
        query_QD = _checked(query_QD, self.dim, "queries")
        mask_N = None if allowed_N is None else np.ascontiguousarray(allowed_N, dtype=bool)
        if mask_N is not None and mask_N.shape != (len(self),):
            raise DimensionMismatch(
                f"the mask has shape {mask_N.shape}, but the index holds {len(self)} vectors: ({len(self)},)"
            )
        count = len(self) if mask_N is None else int(mask_N.sum())
        shape = (len(query_QD), min(k, count))
        if not all(shape):
            return np.empty(shape, np.float32), np.empty(shape, np.int64)
        if count == len(self):
            mask_N = None
        if count < _FEW_ALLOWED * len(self):
            return Flat._best(self, query_QD, shape[1], mask_N, count)
        return self._best(query_QD, shape[1], mask_N, count)

    def _append(self, new_ND: np.ndarray) -> None:
        return

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        raise ValueError(f"the saved index has the arrays {sorted(arrays)}, of which this kind has 'vectors' alone")

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        rows_R = np.arange(count) if mask_N is None else np.flatnonzero(mask_N)
        vectors_RD = self._vectors_ND if mask_N is None else self._vectors_ND[rows_R]
        rankings = [_ranked(query_D, vectors_RD, k) for query_D in query_QD]
        return np.stack([scores_K for scores_K, _ in rankings]), rows_R[np.stack([order_K for _, order_K in rankings])]


def saved_array(arrays: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return a saved array, not copied. Raises ValueError if it is absent or has another dtype or shape (None: any size)."""
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"the saved index has no array {name!r}, only {sorted(arrays)}")
    fits = len(array.shape) == len(shape) and all(w is None or w == s for w, s in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        raise ValueError(f"array {name!r} of the saved index is {array.dtype} {array.shape}, not {dtype} {shape}")
    return array


def _checked(vectors_ND: np.ndarray, dim: int, what: str) -> np.ndarray:
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


def _ranked(query_D: np.ndarray, vectors_ND: np.ndarray, k: int) -> Ranking:
    """Return the k largest inner products and their rows: scores (K,) fp32 descending, ties by row.

    Products run in float64, so that the result depends on neither the order of summation nor the kernel.
    """
    query_D, scores_N = query_D.astype(np.float64), np.empty(len(vectors_ND))
    step = max(1, _BLOCK_NUMBERS // vectors_ND.shape[1])
    for start in range(0, len(vectors_ND), step):
        scores_N[start : start + step] = vectors_ND[start : start + step].astype(np.float64) @ query_D
    scores_N = np.round(scores_N, SCORE_DECIMALS)
    # stable: equal scores keep the order of addition
    rows_K = np.argsort(-scores_N, kind="stable")[:k]
    return scores_N[rows_K].astype(np.float32), rows_K
