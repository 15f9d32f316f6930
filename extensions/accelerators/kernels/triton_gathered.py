"""Per-row mixtures on a GPU: each token reads its own mixture's factors where they are, and nothing is copied.

The idea is BGMV's (Punica, Chen et al., MLSys 2024), for mixtures of any ranks. Made for one or a few tokens a row, where
the time of a step is that of reading factors. Sums and weights are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.extend.live import Cost, Lend, Part, RowSets, Workload
from loraweave.extensions.accelerators.rank_tables import RankTables, TableKernel, triton_runs


@dataclass(frozen=True, eq=False)
class TritonGathered(TableKernel):
    """The Triton kernel for B batch rows with a mixture each. Rows without an expert get zeros."""

    tables: RankTables

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        if not triton_runs(work.device, work.itemsize):
            return None
        # every token reads its own rank rows; a launch by Triton takes about as long as two calls of a library
        return work.of_products(work.total * work.tokens, work.total * work.tokens, calls=4)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> TritonGathered:
        return cls(RankTables.of(parts, rows, dtype))

    def run(self, x_BTI: Tensor, in_DI: Tensor, out_DO: Tensor, y_BTO: Tensor | None) -> Tensor:
        from loraweave.extensions.accelerators.triton_products import expand_each, shrink_each

        index, w, count = self.tables.index_GR, self.tables.w_GR, self.tables.count_G
        num_tokens, (num_groups, width) = x_BTI.shape[0] * x_BTI.shape[1], index.shape
        num_inputs, num_outputs = in_DI.shape[1], out_DO.shape[1]
        found_BTO = x_BTI.new_empty(*x_BTI.shape[:2], num_outputs) if y_BTO is None else y_BTO
        if not num_tokens or not width:
            return found_BTO.zero_() if y_BTO is None else y_BTO
        x_BTI = x_BTI.contiguous()
        hidden_NR = x_BTI.new_empty(num_tokens, width, dtype=torch.float32)
        tokens = num_tokens // num_groups
        shrink_each[(num_tokens, -(-width // 8))](
            x_BTI, in_DI, index, w, count, hidden_NR, tokens, num_inputs, width, BLOCK_R=8, BLOCK_I=256
        )
        expand_each[(num_tokens, -(-num_outputs // 128))](
            hidden_NR, out_DO, index, count, found_BTO, tokens, num_outputs, width,
            ADD=y_BTO is not None, BLOCK_R=8, BLOCK_O=128,
        )  # fmt: skip
        return found_BTO
