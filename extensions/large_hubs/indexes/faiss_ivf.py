"""Approximate search by inner product in the clusters nearest to a query: inverted lists, for 10^5 keys and more."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from loraweave.extend.hubs import Flat, saved_array
from loraweave.extensions.large_hubs.indexes._faiss import (
    BLOCK_ROWS,
    HalfScanner,
    HalfScanners,
    Ranking,
    from_keys,
    import_faiss,
    least_effort,
    rescore,
)
from loraweave.extensions.large_hubs.indexes.faiss_half import NUM_RESCORED, FaissHalf, codes

# below this a scan of everything is as fast, and exact
MIN_CLUSTERED = 10_000

# shares of the lists to search: the least that finds enough is measured whenever the lists are made
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

# vectors added later are scanned one by one; when they are too large a share of all, the lists are made again
_MAX_LATE_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class _Lists:
    """Rows in the order of their lists: list c is starts[c] to starts[c + 1]; rows added later follow the last list.

    `share` is the share of the lists that a search looks into, those of the nearest centres.
    """

    share: float
    centres_CD: np.ndarray
    starts: np.ndarray
    rows_N: np.ndarray
    codes_ND: np.ndarray


class FaissIvf(Flat):
    """An index of vectors of `dim` numbers in order of addition. Raises PackageMissing without faiss.

    Scores are exact, but a row in a list that was not searched is missed. The number of lists to search depends on the
    vectors, so it is measured on a hundred of them: twice as many as are needed to find 97 % of their ten nearest. Below
    10,000 vectors, and for filters that leave few, everything is scanned and nothing is missed.
    """

    exact = False
    # benchmarks/hub.py
    default_from = from_keys(200_000)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._scanners = HalfScanners(import_faiss("faiss_ivf"), dim, numbered=True)
        self._all: FaissHalf | None = FaissHalf(dim)
        self._lists: _Lists | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return {name: array} of all arrays that an index file needs."""
        if self._all is not None:
            return self._all.arrays()
        assert self._lists is not None
        lists = self._lists
        kept = {"centres": lists.centres_CD, "starts": lists.starts, "rows": lists.rows_N, "codes": lists.codes_ND}
        return {"vectors": self._vectors_ND, **kept, "share": np.array([lists.share], np.float32)}

    def _append(self, new_ND: np.ndarray) -> None:
        lists = self._lists
        if lists is None or len(self) - int(lists.starts[-1]) > _MAX_LATE_SHARE * len(self):
            self._make()
            return
        rows_N = np.concatenate([lists.rows_N, np.arange(len(self) - len(new_ND), len(self))])
        codes_ND = np.concatenate([lists.codes_ND, codes(new_ND)])
        self._lists = _Lists(lists.share, lists.centres_CD, lists.starts, rows_N, codes_ND)

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        if "centres" not in arrays:
            self._all = FaissHalf.from_arrays(self.dim, arrays)
            return
        centres_CD = saved_array(arrays, "centres", "<f4", (None, self.dim))
        starts = saved_array(arrays, "starts", "<i8", (len(centres_CD) + 1,))
        rows_N = saved_array(arrays, "rows", "<i8", (len(self),))
        if not len(centres_CD) or starts[0] or (np.diff(starts) < 0).any() or starts[-1] > len(rows_N):
            raise ValueError(f"array 'starts' of the saved index does not divide {len(rows_N)} rows")
        if rows_N.min() < 0 or rows_N.max() >= len(rows_N):
            raise ValueError(f"array 'rows' of the saved index has numbers outside 0 to {len(rows_N) - 1}")
        codes_ND = saved_array(arrays, "codes", "<f2", self._vectors_ND.shape)
        share = float(saved_array(arrays, "share", "<f4", (1,))[0])
        if not 0 < share <= 1:
            raise ValueError(f"array 'share' of the saved index is {share}, not above 0 and at most 1")
        self._all, self._lists = None, _Lists(share, centres_CD, starts, rows_N, codes_ND)

    def _best(self, query_QD: np.ndarray, k: int, mask_N: np.ndarray | None, count: int) -> Ranking:
        if self._all is not None:
            return self._all._best(query_QD, k, mask_N, count)
        assert self._lists is not None
        # the rarer allowed rows are, the more lists it takes to meet as many of them
        return self._look(query_QD, k, min(1.0, self._lists.share * len(self) / count), mask_N)

    def _look(self, query_QD: np.ndarray, k: int, share: float, mask_N: np.ndarray | None) -> Ranking:
        """Return (scores, rows) of each query's k best in a `share` of the lists, and in more if those have fewer than k."""
        assert self._lists is not None
        scanner = self._scanners.get(mask_N)
        nearness_QC = query_QD @ self._lists.centres_CD.T
        rows = [self._near(scanner, query_D, n_C, k, share) for query_D, n_C in zip(query_QD, nearness_QC, strict=True)]
        if len({len(rows_R) for rows_R in rows}) == 1:
            return rescore(query_QD, self._vectors_ND, np.stack(rows), k)
        rankings = [
            rescore(q_D[None], self._vectors_ND, rows_R[None], k) for q_D, rows_R in zip(query_QD, rows, strict=True)
        ]
        return np.concatenate([scores for scores, _ in rankings]), np.concatenate([at for _, at in rankings])

    def _near(self, scanner: HalfScanner, query_D: np.ndarray, nearness_C: np.ndarray, k: int, share: float) -> np.ndarray:
        """Return a query's candidate rows, to score exactly: from the nearest `share` of lists, or more to have k."""
        assert self._lists is not None
        lists = self._lists
        num_probed, num_wanted = math.ceil(len(nearness_C) * share), min(len(self), max(k, NUM_RESCORED))
        late = (lists.codes_ND[lists.starts[-1] :], lists.rows_N[lists.starts[-1] :])
        while True:
            num_probed = min(num_probed, len(nearness_C))
            probed = np.argpartition(-nearness_C, num_probed - 1)[:num_probed]
            bounds = zip(lists.starts[probed].tolist(), lists.starts[probed + 1].tolist(), strict=True)
            parts = [(lists.codes_ND[start:end], lists.rows_N[start:end]) for start, end in bounds]
            rows_R = scanner.best(query_D, [*parts, late], num_wanted)[1]
            if len(rows_R) >= k or num_probed == len(nearness_C):
                return rows_R
            # the mask, or a large k, leaves too few in these lists
            num_probed *= 4

    def _make(self) -> None:
        if len(self) < MIN_CLUSTERED:
            self._all, self._lists = FaissHalf.from_arrays(self.dim, {"vectors": self._vectors_ND}), None
            return
        # with this many lists, finding the nearest ones and searching them cost about the same
        count = round(2 * math.sqrt(len(self)))
        # from a sample drawn by one seed: the same vectors give the same centres
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.permutation(len(self))[: count * _SAMPLES_PER_CENTRE])
        centres_CD = _gathered(_unit(self._vectors_ND[chosen]), count, rng)
        rows_N, starts = _by_list(nearest(self._vectors_ND, centres_CD), len(centres_CD))
        codes_ND = np.empty(self._vectors_ND.shape, np.float16)
        for start in range(0, len(self), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            codes_ND[part] = codes(self._vectors_ND[rows_N[part]])
        made = _Lists(1.0, centres_CD.astype(np.float32), starts, rows_N, codes_ND)
        self._all, self._lists = None, made
        share = least_effort(SHARES, lambda query_QD, k, share: self._look(query_QD, k, share, None)[1], self._vectors_ND)
        self._lists = replace(made, share=share)


# this few vectors per centre place it nearly as well as all, at a fraction of the work
_SAMPLES_PER_CENTRE = 32
_NUM_ROUNDS = 6

# this many centres or more are searched in groups; there are as many groups as the square root of the centres
_MANY_CENTRES = 400
_NEAR_GROUPS = 6
_NUM_PROBED, _LEAST_RIGHT = 1024, 0.95


def _gathered(sample_SD: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` centres (count, D), unit vectors, of the sample by spherical k-means (Dhillon and Modha 2001)."""
    centres_CD = sample_SD[np.sort(rng.permutation(len(sample_SD))[:count])]
    for _ in range(_NUM_ROUNDS):
        rows_S, starts = _by_list(nearest(sample_SD, centres_CD), count)
        parts = np.split(sample_SD[rows_S], starts[1:-1])
        # a centre without a vector moves to one of the sample, where it can win some
        centres_CD = sample_SD[rng.integers(len(sample_SD), size=count)]
        # a sum for each takes a tenth of the time of one `reduceat`
        centres_CD[np.diff(starts) > 0] = _unit(np.stack([part_RD.sum(axis=0) for part_RD in parts if len(part_RD)]))
    return centres_CD


def nearest(vectors_ND: np.ndarray, centres_CD: np.ndarray) -> np.ndarray:
    """Return (N,): the number of the centre with the largest inner product with each vector; if many, nearly always.

    Many centres are grouped around centres of their own, and a vector is compared with the centres of the nearest group and
    of the few beside it: a seventh of the work at 2,000. If that is wrong for some of a sample, as for vectors without
    clusters, all are compared by the naive twin, `nearest_of_all`.
    """
    probe_PD = vectors_ND[:: max(1, len(vectors_ND) // _NUM_PROBED)]
    if len(centres_CD) < _MANY_CENTRES or len(vectors_ND) < 4 * _NUM_PROBED:
        return nearest_of_all(vectors_ND, centres_CD)
    find = _grouped(centres_CD)
    right = float(np.mean(find(probe_PD) == nearest_of_all(probe_PD, centres_CD)))
    return find(vectors_ND) if right >= _LEAST_RIGHT else nearest_of_all(vectors_ND, centres_CD)


def _grouped(centres_CD: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    num_groups = round(math.sqrt(len(centres_CD)))
    groups_GD = _gathered(_unit(centres_CD), num_groups, np.random.default_rng(0))
    group_C = nearest_of_all(centres_CD, groups_GD)
    near_GW = np.argsort(-(groups_GD @ groups_GD.T), axis=1, kind="stable")[:, :_NEAR_GROUPS]
    members = [np.flatnonzero(np.isin(group_C, near_W)) for near_W in near_GW]

    def find(vectors_ND: np.ndarray) -> np.ndarray:
        found_N = np.zeros(len(vectors_ND), np.int64)
        rows_N, starts = _by_list(nearest_of_all(vectors_ND, groups_GD), num_groups)
        for members_M, (begin, end) in zip(members, pairwise(starts.tolist()), strict=True):
            if not len(members_M):
                continue
            centres_MD = centres_CD[members_M]
            for start in range(begin, end, BLOCK_ROWS):
                rows_B = rows_N[start : min(end, start + BLOCK_ROWS)]
                found_N[rows_B] = members_M[(vectors_ND[rows_B] @ centres_MD.T).argmax(axis=1)]
        return found_N

    return find


def _by_list(list_N: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows by their list in `list_N`, starts): list c has rows[starts[c] : starts[c + 1]], of `count` lists."""
    rows_N = np.argsort(list_N, kind="stable").astype(np.int64)
    return rows_N, np.searchsorted(list_N[rows_N], np.arange(count + 1)).astype(np.int64)


def nearest_of_all(vectors_ND: np.ndarray, centres_CD: np.ndarray) -> np.ndarray:
    """Return (N,): the number of the centre with the largest inner product with each vector."""
    found_N = np.empty(len(vectors_ND), np.int64)
    for start in range(0, len(vectors_ND), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        found_N[part] = (vectors_ND[part] @ centres_CD.T).argmax(axis=1)
    return found_N


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    norm_N = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(norm_N > 0, norm_N, 1)
