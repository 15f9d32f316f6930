"""Faiss on arrays that it does not own, so that a mapped file is searched in place and no index file of faiss is ever read.

Faiss trusts its own files, which a hub's folder could bring from anywhere; a plain array has nothing in it to trust.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loraweave.errors import PackageMissing
from loraweave.retrieval.indexes._vectors import Found


def import_faiss(index: str) -> Any:
    """The module. PackageMissing with the install command, naming the index that wants it."""
    try:
        import faiss
    except ImportError as error:
        raise PackageMissing(
            f"the index {index!r} needs faiss: pip install 'faiss-cpu>=1.15' (or index='flat', which needs only numpy)"
        ) from error
    return faiss


def scan_vectors(faiss: Any, query_QD: np.ndarray, vectors_ND: np.ndarray, num: int, allowed_N: np.ndarray | None) -> Found:
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
    """Scans rows kept in half precision, `codes_ND` as fp16, with the query in full precision."""

    def __init__(self, faiss: Any, dim: int, allowed_N: np.ndarray | None) -> None:
        self._faiss = faiss
        # both are referred to by the scanner, which does not keep them alive
        self._quantizer = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        self._selector = None if allowed_N is None else selector(faiss, allowed_N)
        self._scanners = [
            self._quantizer.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, pairs, self._selector, False)
            for pairs in (True, False)
        ]

    def best(self, query_D: np.ndarray, lists: list[tuple[np.ndarray, np.ndarray | None]], num: int) -> Found:
        """The `num` largest products over all lists of (codes, rows), rows None for those of one list in order.

        Fewer, when there are fewer; in no order.
        """
        scores_R = np.full(num, -np.finfo(np.float32).max, np.float32)
        rows_R = np.full(num, -1, np.int64)
        to_scores, to_rows = self._faiss.swig_ptr(scores_R), self._faiss.swig_ptr(rows_R)
        scanner = self._scanners[0 if lists and lists[0][1] is None else 1]
        scanner.set_query(self._faiss.swig_ptr(query_D))
        scanner.list_no = 0
        for codes_BD, rows_B in lists:
            if len(codes_BD):
                codes = self._faiss.swig_ptr(codes_BD.view(np.uint8).reshape(-1))
                rows = None if rows_B is None else self._faiss.swig_ptr(rows_B)
                scanner.scan_codes(len(codes_BD), codes, rows, to_scores, to_rows, num)
        found_R = rows_R >= 0
        return scores_R[found_R], rows_R[found_R]


def selector(faiss: Any, allowed_N: np.ndarray) -> Any:
    """Faiss's form of a mask."""
    return faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))
