"""Per-row mixtures on a GPU: each token reads its own mixture's factors where they are, and nothing is gathered.

The idea is BGMV's (Punica, Chen et al., MLSys 2024), for mixtures of any ranks. Made for a token or a few of each row,
where a step costs what it reads. Sums and weights are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.live.kernels._parts import AddsInPlace, Part, RowSets, rank_rows, row_sets
from loraweave.composer.live.kernels._rank_tables import RankTables, triton_runs
from loraweave.composer.live.kernels.naive import naive


@dataclass(frozen=True, eq=False)
class TritonGathered(AddsInPlace):
    """A mixture for each of B rows. Rows without a part get zeros."""

    tables: RankTables

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype) -> TritonGathered:
        return cls(RankTables.of(parts, rows, dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.a_DI.dtype

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes

    def update(self, x_BTI: Tensor) -> Tensor:
        update_BTO: Tensor = _Product.apply(x_BTI, self.tables, False)  # type: ignore[no-untyped-call]
        return update_BTO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        _run(x_BTI, self.tables.a_DI, self.tables.b_DO, self.tables, y_BTO, add=True)


class _Product(torch.autograd.Function):
    """x a^T * w b; its gradient is the same with a and b in each other's place."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, tables: RankTables, turned: bool) -> Tensor:
        ctx.tables, ctx.turned = tables, turned
        in_DI, out_DO = (tables.b_DO, tables.a_DI) if turned else (tables.a_DI, tables.b_DO)
        return _run(x_BTI, in_DI, out_DO, tables, x_BTI.new_empty(*x_BTI.shape[:2], out_DO.shape[1]), add=False)

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor, None, None]:
        # as a product with a gradient of its own, for those who differentiate twice
        return _Product.apply(grad_BTO, ctx.tables, not ctx.turned), None, None  # type: ignore[no-untyped-call]


def _run(x_BTI: Tensor, in_DI: Tensor, out_DO: Tensor, tables: RankTables, y_BTO: Tensor, *, add: bool) -> Tensor:
    from loraweave.composer.live.kernels._triton_products import expand_each, shrink_each

    num_tokens, (num_groups, width) = x_BTI.shape[0] * x_BTI.shape[1], tables.index_GR.shape
    if not num_tokens or not width:
        return y_BTO if add else y_BTO.zero_()
    x_BTI = x_BTI.contiguous()
    num_inputs, num_outputs = in_DI.shape[1], out_DO.shape[1]
    hidden_NR = x_BTI.new_empty(num_tokens, width, dtype=torch.float32)
    index, w, count, tokens = tables.index_GR, tables.w_GR, tables.count_G, num_tokens // num_groups
    shrink_each[(num_tokens, -(-width // 8))](
        x_BTI, in_DI, index, w, count, hidden_NR, tokens, num_inputs, width, BLOCK_R=8, BLOCK_I=256
    )
    expand_each[(num_tokens, -(-num_outputs // 128))](
        hidden_NR, out_DO, index, count, y_BTO, tokens, num_outputs, width, ADD=add, BLOCK_R=8, BLOCK_O=128
    )
    return y_BTO


def triton_gathered(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`, by each row's own rank rows. Where Triton does not run, it is `naive`."""
    rows = row_sets(w_BTS)
    if not rows or not any(rows) or not triton_runs(x_BTI.device, x_BTI.dtype):
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    return TritonGathered.of(rank_rows(a_SI, b_OS), rows, x_BTI.dtype).update(x_BTI)
