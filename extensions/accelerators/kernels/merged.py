"""One mixture for all rows, multiplied out to a matrix once: cheaper than factors whose ranks add up to a full matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.extend.live import Cost, Lend, Part, RowKernel, RowSets, Workload, own_precision, weigh_b


@dataclass(frozen=True, eq=False)
class Merged(RowKernel):
    """The matrix delta_OI = sum over experts of w_e b_e a_e, multiplied in fp32 or better and rounded once."""

    # a full matrix in fp32 would take twice the layer's own memory
    widens: ClassVar[bool] = False
    is_shared: ClassVar[bool | None] = True

    delta_OI: Tensor

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        full = work.num_inputs * work.num_outputs
        return Cost(2 * work.num_mixtures * work.tokens * full, work.itemsize * (work.moved + full), calls=1)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Merged:
        used = [parts[p] for p, _ in rows[0]]
        exact = torch.promote_types(dtype, torch.float32)
        with own_precision(used[0].a_RI.device):
            delta_OI = weigh_b(used, [w for _, w in rows[0]], exact).T @ torch.cat([part.a_RI for part in used]).to(exact)
        return cls(delta_OI.to(dtype))

    def update(self, x_BTI: Tensor) -> Tensor:
        return linear(x_BTI, self.delta_OI)

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        num_outputs, num_inputs = self.delta_OI.shape
        y_BTO.view(-1, num_outputs).addmm_(x_BTI.reshape(-1, num_inputs), self.delta_OI.T)
