"""Rows sorted by their mixture on a GPU: all segments in one pair of launches, each with its own number of ranks.

The idea is SGMV's (Punica, Chen et al., MLSys 2024). Made for many tokens of each mixture. Sums and weights are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.live.kernels._parts import AddsInPlace, Part, RowSets, group_rows, rank_rows, row_sets
from loraweave.composer.live.kernels._rank_tables import RankTables, triton_runs
from loraweave.composer.live.kernels.naive import naive


@dataclass(frozen=True, eq=False)
class TritonSegments(AddsInPlace):
    """The distinct mixtures of B rows; the rows member_M[first_G[g] : first_G[g + 1]] have mixture g.

    Rows without a part are in no segment. `largest` is the most rows of one.
    """

    tables: RankTables
    num_rows: int
    largest: int
    member_M: Tensor
    first_G: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype) -> TritonSegments:
        members = group_rows(rows)
        tables = RankTables.of(parts, list(members), dtype)
        sizes = [len(numbers) for numbers in members.values()]
        first = [sum(sizes[:g]) for g in range(len(sizes) + 1)]
        device = tables.a_DI.device
        return cls(
            tables,
            len(rows),
            max(sizes),
            torch.tensor([number for numbers in members.values() for number in numbers], dtype=torch.int32, device=device),
            torch.tensor(first, dtype=torch.int32, device=device),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.a_DI.dtype

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes + self.member_M.nbytes + self.first_G.nbytes

    def update(self, x_BTI: Tensor) -> Tensor:
        update_BTO: Tensor = _Product.apply(x_BTI, self, False)  # type: ignore[no-untyped-call]
        return update_BTO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        self.run(x_BTI, self.tables.a_DI, self.tables.b_DO, y_BTO, add=True)

    def run(self, x_BTI: Tensor, in_DI: Tensor, out_DO: Tensor, y_BTO: Tensor, *, add: bool) -> Tensor:
        """x in^T * w out into y, or added to it."""
        from loraweave.composer.live.kernels._triton_products import expand_group, shrink_group

        index, w, count = self.tables.index_GR, self.tables.w_GR, self.tables.count_G
        num_tokens, (num_groups, width) = x_BTI.shape[0] * x_BTI.shape[1], index.shape
        if not num_tokens:
            return y_BTO
        x_BTI = x_BTI.contiguous()
        num_inputs, num_outputs, tokens = in_DI.shape[1], out_DO.shape[1], num_tokens // self.num_rows
        hidden_NR = x_BTI.new_empty(num_tokens, width, dtype=torch.float32)
        # the interpreter, which stands in where there is no GPU, multiplies the bits of bfloat16 as if they were numbers
        as_fp32 = x_BTI.device.type == "cpu"
        num_blocks = -(-self.largest * tokens // 32)
        shrink_group[(num_groups, num_blocks, -(-width // 16))](
            x_BTI, in_DI, index, w, count, self.member_M, self.first_G, hidden_NR, tokens, num_inputs, width,
            AS_FP32=as_fp32, BLOCK_N=32, BLOCK_R=16, BLOCK_I=64,
        )  # fmt: skip
        expand_group[(num_groups, num_blocks, -(-num_outputs // 64))](
            hidden_NR, out_DO, index, count, self.member_M, self.first_G, y_BTO, tokens, num_outputs, width,
            ADD=add, AS_FP32=as_fp32, BLOCK_N=32, BLOCK_R=16, BLOCK_O=64,
        )  # fmt: skip
        return y_BTO


class _Product(torch.autograd.Function):
    """x a^T * w b; its gradient is the same with a and b in each other's place."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, segments: TritonSegments, turned: bool) -> Tensor:
        ctx.segments, ctx.turned = segments, turned
        tables = segments.tables
        in_DI, out_DO = (tables.b_DO, tables.a_DI) if turned else (tables.a_DI, tables.b_DO)
        return segments.run(x_BTI, in_DI, out_DO, x_BTI.new_zeros(*x_BTI.shape[:2], out_DO.shape[1]), add=False)

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor, None, None]:
        # as a product with a gradient of its own, for those who differentiate twice
        return _Product.apply(grad_BTO, ctx.segments, not ctx.turned), None, None  # type: ignore[no-untyped-call]


def triton_segments(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`, by segments of rows with one mixture. Where Triton does not run, it is `naive`."""
    rows = row_sets(w_BTS)
    if not rows or not any(rows) or not triton_runs(x_BTI.device, x_BTI.dtype):
        return naive(x_BTI, a_SI, b_OS, w_BTS)
    if len(rows) == 1:
        rows = rows * max(x_BTI.shape[0], 1)
    return TritonSegments.of(rank_rows(a_SI, b_OS), rows, x_BTI.dtype).update(x_BTI)
