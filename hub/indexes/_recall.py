"""How thoroughly an approximate index must look so that it finds what is there: measured on its own vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from loraweave.hub.indexes._exact import scan_products
from loraweave.hub.indexes._vectors import rescore

# of the ten nearest to a vector of the index, itself not counted, so many are found on average
GOAL = 0.97

_NUM_NEAREST = 10
_NUM_QUERIES = 100
# near ties that the fp32 products may put in another order
_SPARE = 6


Search = Callable[[np.ndarray, int, float], np.ndarray]


def least_effort(efforts: Sequence[float], search: Search, vectors_ND: np.ndarray) -> float:
    """The effort after the first at which `search(query_QD, k, effort)` finds enough; the last of them if none does.

    One step more, because texts that are searched for lie less close to the vectors than these to each other.
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
