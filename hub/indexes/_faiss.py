"""Faiss on arrays that it does not own, so that a mapped file is searched in place and no index file of faiss is ever read.

Faiss trusts its own files, which a hub's folder could bring from anywhere; a plain array needs no trust.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from loraweave.errors import PackageMissing
from loraweave.hub.indexes._vectors import Ranking, rescore, scan_products


def import_faiss(index: str) -> Any:
    """Return the module. Raises PackageMissing with the install command, naming the index that needs it."""
    try:
        import faiss
    except ImportError as error:
        raise PackageMissing(
            f"the index {index!r} needs faiss: pip install 'faiss-cpu>=1.15' (or index='flat', which needs only numpy)"
        ) from error
    return faiss


def scan_vectors(
    faiss: Any, vectors_ND: np.ndarray, allowed_N: np.ndarray | None, query_QD: np.ndarray, num: int
) -> Ranking:
    """Return the `num` largest fp32 products of each query, and their rows."""
    num = min(num, len(vectors_ND) if allowed_N is None else int(allowed_N.sum()))
    scores_QR = np.empty((len(query_QD), num), np.float32)
    rows_QR = np.empty((len(query_QD), num), np.int64)
    faiss.knn_inner_product(
        faiss.swig_ptr(query_QD),
        faiss.swig_ptr(vectors_ND),
        vectors_ND.shape[1],
        len(query_QD),
        len(vectors_ND),
        num,
        faiss.swig_ptr(scores_QR),
        faiss.swig_ptr(rows_QR),
        None if allowed_N is None else selector(faiss, allowed_N),
    )
    return scores_QR, rows_QR


class HalfScanner:
    """A scanner of rows in half precision, `codes_ND` as fp16, with the query in full precision. For one thread."""

    def __init__(self, faiss: Any, dim: int, allowed_N: np.ndarray | None, numbered: bool) -> None:
        self._faiss = faiss
        # the scanner refers to both and does not keep them alive
        self._quantizer = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        self._selector = None if allowed_N is None else selector(faiss, allowed_N)
        # faiss reports a row's place in the one list, or the number given with it
        self._scanner = self._quantizer.select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, None, not numbered, self._selector, False
        )

    def best(self, query_D: np.ndarray, lists: list[tuple[np.ndarray, np.ndarray | None]], num: int) -> Ranking:
        """Return the `num` largest products over all lists of (codes, row numbers or None), and their rows, in no order.

        There are fewer if the lists have fewer rows. Without numbers there is one list.
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
        if bool((rows_R < 0).any()):
            found_R = rows_R >= 0
            scores_R, rows_R = scores_R[found_R], rows_R[found_R]
        return scores_R, rows_R


class HalfScanners(threading.local):
    """Scanners of codes: one for every thread that searches without a mask, a new one for every mask."""

    def __init__(self, faiss: Any, dim: int, *, numbered: bool) -> None:
        self._arguments = faiss, dim
        self._numbered = numbered
        self._unmasked = HalfScanner(faiss, dim, None, numbered)

    def get(self, allowed_N: np.ndarray | None) -> HalfScanner:
        return self._unmasked if allowed_N is None else HalfScanner(*self._arguments, allowed_N, self._numbered)


def selector(faiss: Any, allowed_N: np.ndarray) -> Any:
    """Return faiss's form of a mask."""
    return faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))


# the share of the ten nearest to a vector of the index, itself not counted, that must be found on average
GOAL = 0.97

_NUM_NEAREST = 10
_NUM_QUERIES = 100
# near ties that the fp32 products may put in another order
_SPARE = 6


Search = Callable[[np.ndarray, int, float], np.ndarray]


def least_effort(efforts: Sequence[float], search: Search, vectors_ND: np.ndarray) -> float:
    """Return the effort after the first at which `search(query_QD, k, effort)` finds enough; the last if none does.

    It is one step more because query texts lie less close to the vectors than these to each other.
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
