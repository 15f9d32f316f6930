"""One mixture for all rows: its experts' factors side by side, as one pair of matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.kernels._parts import AddsInPlace, Part, rank_rows, row_sets, stack_a, weigh_b
from loraweave.composer.live.kernels.naive import naive


@dataclass(frozen=True, eq=False)
class Shared(AddsInPlace):
    """The factors of one mixture, its weights in b."""

    a_RI: Tensor
    b_RO: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], row: Sequence[tuple[int, float]], dtype: torch.dtype) -> Shared:
        used = [parts[p] for p, _ in row]
        return cls(stack_a(used, dtype), weigh_b(used, [w for _, w in row], dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.a_RI.dtype

    @property
    def num_bytes(self) -> int:
        return self.a_RI.nbytes + self.b_RO.nbytes

    def update(self, x_BTI: Tensor) -> Tensor:
        return linear(x_BTI, self.a_RI) @ self.b_RO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        hidden_NR = linear(x_BTI.reshape(-1, self.a_RI.shape[1]), self.a_RI)
        y_BTO.view(-1, self.b_RO.shape[1]).addmm_(hidden_NR.to(y_BTO.dtype), self.b_RO)


def shared(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`, by one pair of products where all rows have one mixture."""
    rows = row_sets(w_BTS)
    if rows is None or not rows or len(set(rows)) > 1 or not rows[0]:
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    return Shared.of(rank_rows(a_SI, b_OS), rows[0], x_BTI.dtype).update(x_BTI)
