"""One mixture for all rows: its experts' factors side by side, as one pair of matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.kernels._parts import Cost, Lend, Part, RowKernel, RowSets, Workload, stack_a, weigh_b


@dataclass(frozen=True, eq=False)
class Shared(RowKernel):
    """The factors of one mixture, with its weights multiplied into b."""

    is_shared: ClassVar[bool | None] = True

    a_RI: Tensor
    b_RO: Tensor

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        return work.of_products(work.num_mixtures * work.tokens * work.largest, work.largest, calls=2)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Shared:
        used = [parts[p] for p, _ in rows[0]]
        return cls(stack_a(used, dtype), weigh_b(used, [w for _, w in rows[0]], dtype))

    def update(self, x_BTI: Tensor) -> Tensor:
        return linear(x_BTI, self.a_RI) @ self.b_RO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        hidden_NR = linear(x_BTI.reshape(-1, self.a_RI.shape[1]), self.a_RI)
        y_BTO.view(-1, self.b_RO.shape[1]).addmm_(hidden_NR.to(y_BTO.dtype), self.b_RO)
