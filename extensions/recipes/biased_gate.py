"""The gate whose choice is kept even by a bias that training moves, without a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.extend import Gate


class BiasedGate(Gate):
    """A gate that chooses, for each token, the `top_k` highest scores + bias_E, and whose bias_E training moves from 0 on.

    After each step bias_e grows by `rate` where fewer real tokens than the mean chose e, and falls by it where more did:
    busy experts are chosen less, and no loss says so (Wang et al. 2024, arXiv 2408.15664). A rate of 0 leaves the bias 0.
    """

    # a choice passes no gradient on
    skips = True

    def __init__(self, num_experts: int, *, top_k: int, rate: float) -> None:
        super().__init__(num_experts, most=top_k)
        self.rate = rate
        self.bias_E = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    @property
    def moved(self) -> list[nn.Parameter]:
        return [self.bias_E] if self.rate else []

    def move(self, chosen_E: Tensor) -> None:
        chosen_E = chosen_E.to(self.bias_E)
        self.bias_E.add_(self.rate * (chosen_E.mean() - chosen_E).sign())

    def chosen(self, biased_BTE: Tensor) -> Tensor:
        """Return 1 for the chosen experts, each token's highest, and 0 for the others."""
        return torch.zeros_like(biased_BTE).scatter(-1, biased_BTE.detach().topk(self.most, dim=-1).indices, 1.0)
