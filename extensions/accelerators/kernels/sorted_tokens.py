"""Tokens sorted by expert: each expert meets only the tokens that chose it.

It is for tokens that use few experts out of many, where every other kernel would multiply all tokens with all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.extend.live import AddsInPlace, Cost, Part, TokenWorkload

# seconds of an indexing or elementwise call on a CPU
S_PER_OP = 2e-6


@dataclass(frozen=True, eq=False)
class SortedTokens(AddsInPlace):
    """The kernel that multiplies each of P experts with only those tokens for which its weight in w_BTP is not 0.

    The weights are fp32 or float64; B divides the batch rows of x. Inputs and products are in `dtype`.
    """

    parts: Sequence[Part]
    w_BTP: Tensor
    dtype: torch.dtype

    @staticmethod
    def token_seconds(work: TokenWorkload) -> float:
        """Return the estimated seconds of one `update` on a CPU."""
        width, num_used = work.num_inputs + work.num_outputs, min(work.num_experts, work.chosen)
        # a chosen token's input is copied, and its output read and written twice
        moved = work.chosen * (2 * work.num_inputs + 3 * work.num_outputs) + work.stacked * width
        ranks = work.chosen * work.stacked / work.num_experts
        by_expert = Cost(2 * ranks * width, work.itemsize * moved + 24 * work.num_tokens * work.num_experts, 2 * num_used)
        return work.rates.seconds(by_expert) + S_PER_OP * (5 * num_used + 10)

    @property
    def num_bytes(self) -> int:
        return self.w_BTP.nbytes

    def update(self, x_BTI: Tensor) -> Tensor:
        update_NO = x_BTI.new_zeros(x_BTI.shape[0] * x_BTI.shape[1], self.parts[0].b_RO.shape[1])
        return self._into(x_BTI, update_NO).view(*x_BTI.shape[:2], update_NO.shape[1])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        self._into(x_BTI, y_BTO.view(-1, y_BTO.shape[2]))

    def _into(self, x_BTI: Tensor, sum_NO: Tensor) -> Tensor:
        w_BTP, num_rows = self.w_BTP, self.w_BTP.shape[0]
        if num_rows not in (1, x_BTI.shape[0]):
            w_BTP = w_BTP.repeat_interleave(x_BTI.shape[0] // num_rows, dim=0)
        x_NI = x_BTI.reshape(-1, x_BTI.shape[2])
        w_NP = w_BTP.expand(*x_BTI.shape[:2], -1).reshape(-1, w_BTP.shape[2])
        # a weight that learns keeps its gradient at zero
        chosen_PN = torch.ones_like(w_NP, dtype=torch.bool).T if w_NP.requires_grad else (w_NP != 0).T
        part_Z, token_Z = chosen_PN.nonzero(as_tuple=True)
        counts = torch.bincount(part_Z, minlength=len(self.parts)).tolist()
        for index, token_N in enumerate(torch.split(token_Z, counts)):
            if token_N.shape[0]:
                part = self.parts[index]
                hidden_NR = linear(x_NI[token_N], part.a_RI.to(self.dtype))
                exact = torch.promote_types(hidden_NR.dtype, torch.float32)
                mixed_NR = (hidden_NR.to(exact) * w_NP[token_N, index, None]).to(self.dtype)
                # the product is in half precision below autocast
                sum_NO = sum_NO.index_add_(0, token_N, (mixed_NR @ part.b_RO.to(self.dtype)).to(sum_NO.dtype))
        return sum_NO
