"""Approximate search by inner product along a graph of neighbours: HNSW (Malkov and Yashunin 2016) with faiss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loraweave.extend import Flat, saved_array
from loraweave.extensions.large_hubs.indexes._faiss import (
    Ranking,
    import_faiss,
    least_effort,
    rescore,
    scan_products,
    selector,
)
from loraweave.extensions.large_hubs.indexes.faiss_half import NUM_RESCORED, FaissHalf

# below this a scan of everything is as fast, and exact
MIN_LINKED = 10_000

# the number of neighbours of a row; twice as many in the lowest layer
NUM_LINKS = 32
_EF_BUILD = 80
# how many candidates a walk keeps: the fewest that find enough are measured when the graph is made
_EFFORTS = (64, 128, 256, 512, 1024)

# from this many wanted on, scanning everything costs less than walking to them
_MANY_WANTED = 500


class FaissHnsw(Flat):
    """Vectors of `dim` numbers in order of addition. Raises PackageMissing without faiss.

    Scores are exact, but a row that the walk does not reach is missed. How far it has to go is measured on a hundred of the
    vectors: twice as far as it takes to find 97 % of their ten nearest. The graph takes minutes to make at 10^6 vectors and
    is copied when it is loaded. Below 10,000 vectors everything is scanned, and nothing is missed.
    """

    exact = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._faiss: Any = import_faiss("faiss_hnsw")
        self._all: FaissHalf | None = FaissHalf(dim)
        self._graph: Any = None
        self._effort = _EFFORTS[-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        if self._all is not None:
            return self._all.arrays()
        graph, to_array = self._graph.hnsw, self._faiss.vector_to_array
        entry = np.array([graph.entry_point], np.int64)
        return {
            "vectors": self._vectors_ND,
            "levels": to_array(graph.levels),
            "links": to_array(graph.neighbors),
            "entry": entry,
            "effort": np.array([self._effort], np.int64),
        }

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        if self._all is not None:
            return self._all._best(query_QD, k, mask_N, count)
        if k > _MANY_WANTED:
            rows_QR = scan_products(self._vectors_ND, mask_N, query_QD, k)[1]
            return rescore(query_QD, self._vectors_ND, rows_QR, k)
        num_wanted = min(count, max(k, NUM_RESCORED))
        allowed = None if mask_N is None else selector(self._faiss, mask_N)
        rows_QR = self._walk(query_QD, num_wanted, max(self._effort, 2 * k), allowed)
        # a mask can cut the walk off from rows that it allows: queries with too few rows are then scanned
        short_Q = (rows_QR < 0).any(axis=1)
        if short_Q.any():
            rows_QR[short_Q] = scan_products(self._vectors_ND, mask_N, query_QD[short_Q], num_wanted)[1]
        return rescore(query_QD, self._vectors_ND, rows_QR, k)

    def _append(self, new_ND: np.ndarray) -> None:
        if len(self) < MIN_LINKED:
            self._all = FaissHalf.from_arrays(self.dim, {"vectors": self._vectors_ND})
            return
        if self._all is not None:
            self._all, self._graph, new_ND = None, self._empty(), self._vectors_ND
        self._graph.add(new_ND)
        if len(new_ND) == len(self):
            self._effort = int(least_effort(_EFFORTS, self._walk, self._vectors_ND))

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        if "levels" not in arrays:
            self._all = FaissHalf.from_arrays(self.dim, arrays)
            return
        levels_N = saved_array(arrays, "levels", "<i4", (len(self),))
        entry = saved_array(arrays, "entry", "<i8", (1,))
        links = saved_array(arrays, "links", "<i4", (None,))
        self._effort = int(saved_array(arrays, "effort", "<i8", (1,))[0])
        if not 0 < self._effort <= len(self):
            raise ValueError(f"array 'effort' of the saved index is {self._effort}, not from 1 to {len(self)}")
        self._all, self._graph = None, self._empty()
        self._fill(levels_N, _offsets(levels_N), links, int(entry[0]))

    def _walk(self, query_QD: np.ndarray, num: int, effort: float, allowed: Any = None) -> np.ndarray:
        options = self._faiss.SearchParametersHNSW(efSearch=int(effort), sel=allowed)
        rows_QR: np.ndarray = self._graph.search(query_QD, num, params=options)[1]
        return rows_QR

    def _empty(self) -> Any:
        faiss = self._faiss
        graph = faiss.IndexHNSWSQ(self.dim, faiss.ScalarQuantizer.QT_fp16, NUM_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = _EF_BUILD
        return graph

    def _fill(self, levels_N: np.ndarray, offsets: np.ndarray, links: np.ndarray, entry: int) -> None:
        """Copy a saved graph into the empty one, after checks: faiss follows its numbers wherever they lead."""
        count = len(levels_N)
        if not 0 <= entry < count or len(links) != offsets[-1] or links.min() < -1 or links.max() >= count:
            raise ValueError(f"array 'links' of the saved index is no graph of {count} rows")
        # a link in a layer must lead to a row that has that layer
        within = np.arange(len(links)) - np.repeat(offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int64))
        layers = np.maximum(0, within // NUM_LINKS - 1)
        if (levels_N[links[links >= 0]] <= layers[links >= 0]).any() or levels_N[entry] != levels_N.max():
            raise ValueError("array 'links' of the saved index leads to layers that rows do not have")
        graph, copy = self._graph, self._faiss.copy_array_to_vector
        self._faiss.downcast_index(graph.storage).add(self._vectors_ND)
        graph.ntotal = count
        copy(np.ascontiguousarray(levels_N), graph.hnsw.levels)
        copy(offsets, graph.hnsw.offsets)
        copy(np.ascontiguousarray(links), graph.hnsw.neighbors)
        graph.hnsw.entry_point, graph.hnsw.max_level = entry, int(levels_N.max()) - 1


def _offsets(levels_N: np.ndarray) -> np.ndarray:
    """Return where each row's links begin: two shares in its lowest layer, one in every other. Raises ValueError."""
    if not len(levels_N) or levels_N.min() < 1 or levels_N.max() > 64:
        raise ValueError("array 'levels' of the saved index has rows outside layers 1 to 64")
    return np.concatenate([[0], np.cumsum((levels_N.astype(np.int64) + 1) * NUM_LINKS)]).astype(np.uint64)
