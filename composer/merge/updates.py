"""The updates that a merge method returns beside factors: dense, if its formula leaves the low-rank form, or cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraweave.types import Factors, Kind


@dataclass(frozen=True, eq=False)
class DenseUpdate:
    """One layer's merged update as a matrix: x -> x delta^T + bias, fp32. `merge` turns it into factors."""

    delta_OI: Tensor
    bias_O: Tensor | None = None
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class TruncatedUpdate:
    """One layer's factors, the rank of the update that was cut to them, and what that cost (relative Frobenius error).

    `inner_EE` has <w_i D_i, w_j D_j> of the experts that have the layer, where the method found it on its way.
    """

    factors: Factors
    rank_in: int
    relative_error: float
    inner_EE: NDArray[np.float64] | None = None


def without_figures(update: Factors | DenseUpdate | TruncatedUpdate) -> Factors | DenseUpdate:
    """Return the update itself, which a `TruncatedUpdate` has as factors."""
    return update.factors if isinstance(update, TruncatedUpdate) else update
