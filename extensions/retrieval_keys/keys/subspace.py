"""The principal angles between the subspaces that two adapters read and write, layer by layer, whatever their size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraweave import Adapter, Factors, HubError, Record
from loraweave.extend import algebra
from loraweave.extend.hubs import KeySpace, Query

# directions below this share of the largest are rounding
_RANK_TOLERANCE = 1e-6


class Subspace:
    """The mean squared cosine of the principal angles over both sides of the layers that both update: 0 to 1."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        scores_N = np.full(len(records), np.nan)
        if query.adapter is None:
            return scores_N
        for row, record in enumerate(records):
            try:
                scores_N[row] = overlap(query.adapter, space.adapter(record))
            except HubError:
                # a damaged adapter gets no score; verify() names it
                continue
        return scores_N


def overlap(left: Adapter, right: Adapter) -> float:
    """Return the mean of |U^T V|^2 / min(rank) over shared layers and both sides, U and V being the two adapters' bases.

    NaN if no layer is shared in one shape.
    """
    overlaps = []
    for layer in left.layers.keys() & right.layers.keys():
        one, other = left.layers[layer], right.layers[layer]
        if one.a_RI.shape[1] == other.a_RI.shape[1] and one.b_OR.shape[0] == other.b_OR.shape[0]:
            overlaps += [_angles(a, b) for a, b in zip(_sides(one), _sides(other), strict=True)]
    # summed in one order, whatever order a set has
    return float(np.mean(sorted(overlaps))) if overlaps else float("nan")


def _sides(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of the update's row space (I, r) and column space (O, r), from the factors."""
    q_OR, core_RR, p_IR = algebra.orthonormal(factors.a_RI, factors.b_OR)
    u_RR, values_R, vh_RR = torch.linalg.svd(core_RR)
    rank = int((values_R > _RANK_TOLERANCE * values_R[0]).sum()) if values_R.numel() else 0
    return p_IR @ vh_RR[:rank].T, q_OR @ u_RR[:, :rank]


def _angles(left_DR: Tensor, right_DR: Tensor) -> float:
    smaller = min(left_DR.shape[1], right_DR.shape[1])
    return float((left_DR.T @ right_DR).square().sum()) / smaller if smaller else 0.0
