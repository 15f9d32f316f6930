"""Faiss on arrays that it does not own, so that a mapped file is searched in place and no index file of faiss is ever read.

Faiss trusts its own files, which a hub's folder could bring from anywhere; a plain array has nothing in it to trust.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from loraweave.errors import PackageMissing
from loraweave.hub.indexes._vectors import Ranking


def import_faiss(index: str) -> Any:
    """The module. PackageMissing with the install command, naming the index that wants it."""
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
    """The `num` largest fp32 products of each query and their rows."""
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
    """Scans rows kept in half precision, `codes_ND` as fp16, with the query in full precision. For one thread."""

    def __init__(self, faiss: Any, dim: int, allowed_N: np.ndarray | None, numbered: bool) -> None:
        self._faiss = faiss
        # both are referred to by the scanner, which does not keep them alive
        self._quantizer = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        self._selector = None if allowed_N is None else selector(faiss, allowed_N)
        # faiss names a row by its place in the one list, or by the number that comes with it
        self._scanner = self._quantizer.select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, None, not numbered, self._selector, False
        )

    def best(self, query_D: np.ndarray, lists: list[tuple[np.ndarray, np.ndarray | None]], num: int) -> Ranking:
        """The `num` largest products over all lists of (codes, their numbers), or over one list without; in no order.

        Fewer, when there are fewer.
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
    """Faiss's form of a mask."""
    return faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))
