"""A dense update: what a merge method gives back when its formula leaves the low-rank form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loraweave.types import Kind


@dataclass(frozen=True, eq=False)
class DenseUpdate:
    """One layer's merged update as a matrix: x -> x delta^T + bias, fp32. `merge` turns it into factors."""

    delta_OI: Tensor
    bias_O: Tensor | None = None
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
