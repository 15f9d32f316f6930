"""Rows sorted by their mixture on a GPU: all segments in one pair of launches, each with its own number of ranks.

The idea is SGMV's (Punica, Chen et al., MLSys 2024). Made for many tokens of each mixture. Sums and weights are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.extend.live import Cost, Lend, Part, RowSets, Workload
from loraweave.extensions.accelerators.rank_tables import RankTables, TableKernel, group_rows, triton_runs

# the tokens of one segment in one block
BLOCK_N = 32


@dataclass(frozen=True, eq=False)
class TritonSegments(TableKernel):
    """The kernel of G distinct mixtures; the batch rows member_M[first_G[g] : first_G[g + 1]] have mixture g.

    Rows without an expert are in no segment. `largest` is the number of rows of the largest segment.
    """

    tables: RankTables
    num_rows: int
    largest: int
    member_M: Tensor
    first_G: Tensor

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        if not triton_runs(work.device, work.itemsize):
            return None
        # every block of a segment's tokens reads the segment's rank rows
        num_blocks = -(-work.num_mixtures * work.tokens // (BLOCK_N * work.num_segments))
        return work.of_products(work.total * work.tokens, work.distinct * num_blocks, calls=4)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> TritonSegments:
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
    def num_bytes(self) -> int:
        return self.tables.num_bytes + self.member_M.nbytes + self.first_G.nbytes

    def run(self, x_BTI: Tensor, in_DI: Tensor, out_DO: Tensor, y_BTO: Tensor | None) -> Tensor:
        from loraweave.extensions.accelerators.triton_products import expand_group, shrink_group

        index, w, count = self.tables.index_GR, self.tables.w_GR, self.tables.count_G
        num_tokens, (num_groups, width) = x_BTI.shape[0] * x_BTI.shape[1], index.shape
        num_inputs, num_outputs = in_DI.shape[1], out_DO.shape[1]
        found_BTO = x_BTI.new_zeros(*x_BTI.shape[:2], num_outputs) if y_BTO is None else y_BTO
        if not num_tokens:
            return found_BTO
        x_BTI = x_BTI.contiguous()
        hidden_NR = x_BTI.new_empty(num_tokens, width, dtype=torch.float32)
        tokens = num_tokens // self.num_rows
        # Triton's interpreter, used without a GPU, multiplies the bits of bfloat16 as if they were numbers
        as_fp32 = x_BTI.device.type == "cpu"
        num_blocks = -(-self.largest * tokens // BLOCK_N)
        shrink_group[(num_groups, num_blocks, -(-width // 16))](
            x_BTI, in_DI, index, w, count, self.member_M, self.first_G, hidden_NR, tokens, num_inputs, width,
            AS_FP32=as_fp32, BLOCK_N=BLOCK_N, BLOCK_R=16, BLOCK_I=64,
        )  # fmt: skip
        expand_group[(num_groups, num_blocks, -(-num_outputs // 64))](
            hidden_NR, out_DO, index, count, self.member_M, self.first_G, found_BTO, tokens, num_outputs, width,
            ADD=y_BTO is not None, AS_FP32=as_fp32, BLOCK_N=BLOCK_N, BLOCK_R=16, BLOCK_O=64,
        )  # fmt: skip
        return found_BTO
