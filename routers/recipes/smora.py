"""SMoRA (Zhao et al. 2025, arXiv 2501.15103): every rank of one LoRA is an expert, and a token gets the best few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.common.options import Count, NonNegative
from loraweave.routers.recipes._gate import Call, Weighing, draw_linear
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site, balance_term
from loraweave.routers.recipes._token_gates import BiasedGate
from loraweave.routers.tokens._learned import Step


@dataclass(frozen=True, kw_only=True)
class Smora(Recipe):
    """y = y0 + alpha / rank * B diag(w) A x, where w is softmax(r x) for the `top_k` ranks of the highest r x + d, else 0.

    `rank` ranks make one LoRA, of which a token uses `top_k`: 8 of 64 by default, which is ours. The bias d of a site begins
    as 0, enters the choice alone, and moves by `bias_rate` after each step of `fit`, up for the ranks that fewer real tokens
    than the mean have had, down for the others; the rate is that of Wang et al. 2024. `balance` times the loss `mixtral` is
    added, which is not published.
    """

    # the bias that training moves was missing
    revision: ClassVar[int] = 2

    rank: Count = 64
    top_k: Count = 8
    bias_rate: NonNegative = 0.001
    balance: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.rank)

    @property
    def num_first_steps(self) -> int:
        # tokens have few of the ranks
        return self.rank + 1

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((1,) * self.rank)

    def gate(self, site: Site, num_experts: int) -> BiasedGate:
        return _RankGate(site.num_inputs, num_experts, top_k=self.top_k, rate=self.bias_rate)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, self.top_k)


class _RankGate(BiasedGate):
    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int, rate: float) -> None:
        super().__init__(num_experts, top_k=top_k, rate=rate)
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    def reset(self, generator: torch.Generator) -> None:
        """r_EI as torch draws a linear layer: uniform between -1/sqrt(I) and 1/sqrt(I)."""
        draw_linear(self.r_EI, generator)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = functional.linear(x_BTI.to(self.r_EI.dtype), self.r_EI)
        return Weighing(self.chosen(scores_BTE + self.bias_E) * scores_BTE.softmax(dim=-1), scores_BTE)
