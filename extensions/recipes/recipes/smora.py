"""SMoRA (Zhao et al. 2025, arXiv 2501.15103): one LoRA whose ranks are the experts; each token uses a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.extend import Count, NonNegative
from loraweave.extend.recipes import Call, ExpertShape, Recipe, Site, Weighing, balance_term, draw_linear
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.limited_gate import BiasedGate


@dataclass(frozen=True, kw_only=True)
class Smora(Recipe):
    """The update y = y0 + alpha / top_k * B diag(w) A x, w = top_k * v / sum of v, of the best `top_k` v = sigmoid(r x) + d.

    Other weights are 0. `rank` ranks make one LoRA, of which a token uses `top_k`. The bias d of a site begins as 0, has no
    gradient, and moves by `bias_rate`: up for ranks that fewer tokens than the mean chose, down for the others. Formula,
    sizes, rate and an alpha of 2 * top_k are those of the released code, which trains otherwise: it counts padding, too,
    moves d in each pass and shows the gate what dropout left of x. Here real tokens count, d moves after each step of `fit`,
    and the gate sees x. `balance` times the loss `mixtral` of r x is added, which is not published.

    `by` "softmax" is this recipe before it followed the released code, which folders saved before still mean: alpha / rank
    comes before the sum, and w is softmax(r x) for the ranks of the highest `top_k` of r x + d, else 0.
    """

    # weights and scale are the released ones
    revision: ClassVar[int] = 3
    before: ClassVar[Mapping[str, Any]] = {"by": "softmax"}

    rank: Count = 64
    top_k: Count = 8
    bias_rate: NonNegative = 1e-5
    balance: NonNegative = 0.0
    by: Literal["sigmoid", "softmax"] = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.rank)

    @property
    def num_first_steps(self) -> int:
        # tokens have few of the ranks
        return self.rank + 1

    @property
    def scale(self) -> float:
        if self.by == "softmax":
            return super().scale
        return 2.0 if self.alpha is None else self.alpha / self.top_k

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((1,) * self.rank)

    def gate(self, site: Site, num_experts: int) -> BiasedGate:
        return _RankGate(site.num_inputs, num_experts, top_k=self.top_k, rate=self.bias_rate, softmax=self.by == "softmax")

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, self.top_k)


class _RankGate(BiasedGate):
    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int, rate: float, softmax: bool) -> None:
        super().__init__(num_experts, top_k=top_k, rate=rate)
        self.softmax = softmax
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    def reset(self, generator: torch.Generator) -> None:
        """Draw r_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I)."""
        draw_linear(self.r_EI, generator)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = functional.linear(x_BTI.to(self.r_EI.dtype), self.r_EI)
        if self.softmax:
            return Weighing(self.chosen(scores_BTE + self.bias_E) * scores_BTE.softmax(dim=-1), scores_BTE)
        values_BTE = scores_BTE.sigmoid() + self.bias_E
        chosen_BTE = self.chosen(values_BTE) * values_BTE
        return Weighing(self.most * chosen_BTE / chosen_BTE.sum(dim=-1, keepdim=True), scores_BTE)
