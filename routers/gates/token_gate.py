"""A gate that looks at each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing
from loraweave.routers.routing.choosing import top_k_softmax


class TokenGate(Gate):
    """w = softmax(r x / temperature) over the `top_k` highest scores of each token, with r_EI; in fp32 or better.

    `top_k` None is all experts. Softmax, then the best k, then made to sum to 1 is the same.
    """

    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int | None = None, temperature: float = 1.0) -> None:
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.temperature = temperature
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    def reset(self, generator: torch.Generator) -> None:
        """r_EI as torch draws a linear layer: uniform between -1/sqrt(I) and 1/sqrt(I)."""
        bound = self.r_EI.shape[1] ** -0.5
        with torch.no_grad():
            self.r_EI.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = x_BTI.to(self.r_EI.dtype) @ self.r_EI.T
        return Weighing(top_k_softmax(scores_BTE, self.top_k, self.temperature), scores_BTE)
