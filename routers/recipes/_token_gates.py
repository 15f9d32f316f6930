"""The gate that weighs each token by the input of its layer, and the functions that turn its scores into weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.routers.recipes._gate import Call, Gate, Weighing, draw_linear
from loraweave.routers.tokens._scores import top_k_softmax


class TokenGate(Gate):
    """A gate with w = softmax(r x) over each token's `top_k` highest scores, with r_EI; in fp32 or better.

    `top_k` None takes all experts. In training alone, `noise` adds normal noise with the standard deviation softplus(n x),
    n_EI learned, before the softmax.

    The weighing's scores are what the softmax was taken of. A subclass may have other `scores`, or `choose` its own way.
    """

    # the softmax or the choice that made a weight 0 passes no gradient on
    skips = True

    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int | None = None, noise: bool = False) -> None:
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))
        self.n_EI = nn.Parameter(torch.empty(num_experts, num_inputs)) if noise else None

    def reset(self, generator: torch.Generator) -> None:
        """Draw r_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I), and set n_EI to 0."""
        draw_linear(self.r_EI, generator)
        if self.n_EI is not None:
            nn.init.zeros_(self.n_EI)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = self.scores(x_BTI.to(self.r_EI.dtype))
        return Weighing(self.choose(scores_BTE), scores_BTE)

    def scores(self, x_BTI: Tensor) -> Tensor:
        """Return scores_BTE of the experts: r x, in training with its noise."""
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        return scores_BTE

    def choose(self, scores_BTE: Tensor) -> Tensor:
        """Return w_BTE for these scores."""
        return top_k_softmax(scores_BTE, self.top_k)


def noisy(scores_BTE: Tensor, spread_BTE: Tensor) -> Tensor:
    """Add normal noise with the standard deviation softplus(spread) to scores (Shazeer et al. 2017, arXiv 1701.06538)."""
    return scores_BTE + torch.randn_like(scores_BTE) * functional.softplus(spread_BTE)
