"""One mixture for all rows, multiplied out once: cheaper than its factors where their ranks add up to a full matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.kernels._parts import AddsInPlace, Part, own_precision, rank_rows, row_sets, stack_a, weigh_b
from loraweave.composer.live.kernels.naive import naive


@dataclass(frozen=True, eq=False)
class Merged(AddsInPlace):
    """The sum of w_e b_e a_e, multiplied in fp32 or better and rounded once."""

    delta_OI: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], row: Sequence[tuple[int, float]], dtype: torch.dtype) -> Merged:
        used = [parts[p] for p, _ in row]
        exact = torch.promote_types(dtype, torch.float32)
        with own_precision(used[0].a_RI.device):
            delta_OI = weigh_b(used, [w for _, w in row], exact).T @ stack_a(used, exact)
        return cls(delta_OI.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.delta_OI.dtype

    @property
    def num_bytes(self) -> int:
        return self.delta_OI.nbytes

    def update(self, x_BTI: Tensor) -> Tensor:
        return linear(x_BTI, self.delta_OI)

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        num_outputs, num_inputs = self.delta_OI.shape
        y_BTO.view(-1, num_outputs).addmm_(x_BTI.reshape(-1, num_inputs), self.delta_OI.T)


def merged(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`, by one dense product where all rows have one mixture."""
    rows = row_sets(w_BTS)
    if rows is None or not rows or len(set(rows)) > 1 or not rows[0]:
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    return Merged.of(rank_rows(a_SI, b_OS), rows[0], x_BTI.dtype).update(x_BTI)
