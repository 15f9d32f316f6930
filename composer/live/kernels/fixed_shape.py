"""One expert after the other, each by products of its own rank: what `batch_invariant` takes, and never the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.kernels._cost import Cost, Workload
from loraweave.composer.live.kernels._parts import Lend, Part, RowKernel, RowSets, group_by_mixture, place_of


@dataclass(frozen=True, eq=False)
class FixedShape(RowKernel):
    """(rows, their weights as (M, 1, 1), a_RI, b_OR) of each expert, in the order of the pool."""

    num_rows: int
    num_outputs: int
    experts: tuple[tuple[slice | Tensor, Tensor, Tensor, Tensor], ...]

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        return None

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> FixedShape:
        experts = []
        for place, part in enumerate(parts):
            used = {number: weights[place] for number, row in enumerate(rows) if place in (weights := dict(row))}
            if used:
                exact = torch.promote_types(dtype, torch.float32)
                w_M11 = torch.tensor(list(used.values()), dtype=exact, device=part.a_RI.device)[:, None, None]
                rows_M = place_of(list(used), part.a_RI.device)
                experts.append((rows_M, w_M11, part.a_RI.to(dtype), part.b_RO.to(dtype).T))
        return cls(len(rows), parts[0].b_RO.shape[1], tuple(experts))

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0][2].dtype

    @property
    def num_bytes(self) -> int:
        return sum(weights.nbytes for _, weights, _, _ in self.experts)

    def update(self, x_BTI: Tensor) -> Tensor:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        update_MNO = x_BTI.new_zeros(*x_MNI.shape[:2], self.num_outputs)
        for rows_M, w_M11, a_RI, b_OR in self.experts:
            hidden_MNR = linear(x_MNI[rows_M], a_RI)
            update_MNO[rows_M] += linear((hidden_MNR * w_M11).to(self.dtype), b_OR)
        return update_MNO.view(*x_BTI.shape[:2], self.num_outputs)

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        y_BTO += self.update(x_BTI)
