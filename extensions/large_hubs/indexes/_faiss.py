"""Faiss on arrays that it does not own, so that a mapped file is searched in place and no index file of faiss is ever read.

Faiss trusts its own files, which a hub's folder could bring from anywhere; a plain array needs no trust. An inexact scan
gives exact results: its best rows are scored again, until no other row can be among them.
"""

import importlib.util
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from loraweave import PackageMissing
from loraweave.extend.hubs import Flat

Ranking = tuple[np.ndarray, np.ndarray]
Scan = Callable[[np.ndarray, int], Ranking]

# how many numbers are widened to float64 at a time: 32 MB
_BLOCK_NUMBERS = 2**22

# the number of rows in one matrix product: 64 queries x 4096 rows x 4 bytes stay in the second cache
BLOCK_ROWS = 4096

# an unsure scan is repeated with this many times more rows
_GROWTH = 8


def from_keys(count: int) -> int | None:
    """Return the number of keys from which an index is the default: `count` if faiss is installed, else None (never)."""
    return count if importlib.util.find_spec("faiss") else None


def import_faiss(index: str) -> Any:
    """Return the module faiss. Raises PackageMissing with the install command, naming the `index` that needs it."""
    try:
        import faiss
    except ImportError as error:
        raise PackageMissing(
            f"the index {index!r} needs faiss: pip install 'faiss-cpu>=1.15' (or index='flat', which needs only numpy)"
        ) from error
    return faiss


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


def rescore(query_QD: np.ndarray, vectors_ND: np.ndarray, positions_QR: np.ndarray, k: int) -> Ranking:
    """Return the k best of each query's R positions, scored as the reference does: scores (Q, K) descending and positions.

    Products run in float64, rounded to six decimals; equal scores are in the order of their positions.
    """
    positions_QR = np.sort(positions_QR, axis=1)
    scores_QR = np.empty(positions_QR.shape)
    width = max(1, _BLOCK_NUMBERS // vectors_ND.shape[1])
    step = max(1, width // max(1, positions_QR.shape[1]))
    for start in range(0, len(query_QD), step):
        queries_BD1 = query_QD[start : start + step].astype(np.float64)[:, :, None]
        for first in range(0, positions_QR.shape[1], width):
            part = slice(start, start + step), slice(first, first + width)
            scores_QR[part] = np.matmul(vectors_ND[positions_QR[part]].astype(np.float64), queries_BD1)[:, :, 0]
    scores_QR = np.round(scores_QR, Flat.decimals)
    order_QK = np.argsort(-scores_QR, axis=1, kind="stable")[:, :k]
    # plain indexing, since take_along_axis takes as long as the scoring
    rows_Q1 = np.arange(len(query_QD))[:, None]
    return scores_QR[rows_Q1, order_QK].astype(np.float32), positions_QR[rows_Q1, order_QK]


def scan_products(vectors_ND: np.ndarray, allowed_N: np.ndarray | None, query_QD: np.ndarray, num: int) -> Ranking:
    """Return the `num` largest fp32 products of each query and their rows, in no order, by a matrix product per block.

    A block's products are compared with the worst score kept so far, which few reach: so most are looked at only once.
    """
    num = min(num, len(vectors_ND) if allowed_N is None else int(allowed_N.sum()))
    best_QR = np.full((len(query_QD), num), -np.inf, np.float32)
    rows_QR = np.full((len(query_QD), num), -1, np.int64)
    for start in range(0, len(vectors_ND) if num else 0, BLOCK_ROWS):
        products_QB = query_QD @ vectors_ND[start : start + BLOCK_ROWS].T
        if allowed_N is not None:
            products_QB[:, ~allowed_N[start : start + BLOCK_ROWS]] = -np.inf
        above_QB = products_QB > best_QR.min(axis=1)[:, None]
        for query in np.flatnonzero(above_QB.any(axis=1)):
            new = np.flatnonzero(above_QB[query])
            scores = np.concatenate([best_QR[query], products_QB[query, new]])
            rows = np.concatenate([rows_QR[query], new + start])
            kept = np.argpartition(-scores, num - 1)[:num]
            best_QR[query], rows_QR[query] = scores[kept], rows[kept]
    return best_QR, rows_QR


class HalfScanner:
    """A scanner of rows in half precision, `codes_ND` as fp16, with the query in full precision. For one thread."""

    def __init__(self, faiss: Any, dim: int, numbered: bool, allowed_N: np.ndarray | None) -> None:
        self._faiss = faiss
        # the scanner refers to both and does not keep them alive
        self._quantizer = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        self._selector = None if allowed_N is None else selector(faiss, allowed_N)
        # faiss reports a row's place in the one list, or the number given with it
        self._scanner = self._quantizer.select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, None, not numbered, self._selector, False
        )

    def best(self, query_D: np.ndarray, lists: list[tuple[np.ndarray, np.ndarray | None]], num: int) -> Ranking:
        """Return (the `num` largest products with the query, their row numbers), in no order, fewer if there are fewer rows.

        `lists` are pairs (fp16 codes, row numbers). Numbers of None are for a single list, of rows 0, 1 and so on.
        """
        scores_R = np.full(num, -np.finfo(np.float32).max, np.float32)
        rows_R = np.full(num, -1, np.int64)
        to_scores, to_rows = self._faiss.swig_ptr(scores_R), self._faiss.swig_ptr(rows_R)
        scanner = self._scanner
        scanner.set_query(self._faiss.swig_ptr(query_D))
        scanner.list_no = 0
        for codes_BD, rows_B in lists:
            if len(codes_BD):
                codes = self._faiss.swig_ptr(codes_BD.view(np.uint8).reshape(-1))
                rows = None if rows_B is None else self._faiss.swig_ptr(rows_B)
                scanner.scan_codes(len(codes_BD), codes, rows, to_scores, to_rows, num)
        return scores_R[rows_R >= 0], rows_R[rows_R >= 0]


class HalfScanners(threading.local):
    """A pool of `HalfScanner`s: one for each thread that searches without a mask of rows, a new one for each mask."""

    def __init__(self, faiss: Any, dim: int, *, numbered: bool) -> None:
        self._make = partial(HalfScanner, faiss, dim, numbered)
        self._unmasked = self._make(None)

    def get(self, allowed_N: np.ndarray | None) -> HalfScanner:
        return self._unmasked if allowed_N is None else self._make(allowed_N)


def selector(faiss: Any, allowed_N: np.ndarray) -> Any:
    """Return faiss's selector of the rows where `allowed_N` is True."""
    return faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))


# the share of the ten nearest to a vector of the index, itself not counted, that must be found on average
GOAL = 0.97

_NUM_NEAREST = 10
_NUM_QUERIES = 100
# near ties that the fp32 products may put in another order
_SPARE = 6


Search = Callable[[np.ndarray, int, float], np.ndarray]


def least_effort(efforts: Sequence[float], search: Search, vectors_ND: np.ndarray) -> float:
    """Return the entry of ascending `efforts` (shares of lists to search) after the least with which `search` finds enough.

    Enough is a share GOAL of the nearest vectors. The next effort is taken since query texts lie less close to the vectors
    than these to each other.
    """
    chosen_Q = np.sort(np.random.default_rng(0).permutation(len(vectors_ND))[:_NUM_QUERIES])
    query_QD = np.ascontiguousarray(vectors_ND[chosen_Q])
    count = _NUM_NEAREST + 1
    near_QR = scan_products(vectors_ND, None, query_QD, count + _SPARE)[1]
    want_QK = rescore(query_QD, vectors_ND, near_QR, count)[1]
    for effort, following in pairwise(efforts):
        found_QK = search(query_QD, count, effort)
        shared = sum(len(np.intersect1d(a, b)) - (q in b) for q, a, b in zip(chosen_Q, want_QK, found_QK, strict=True))
        if shared >= GOAL * _NUM_NEAREST * len(query_QD):
            return following
    return efforts[-1]
