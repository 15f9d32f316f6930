"""A gate that looks at each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.errors import WeightingError
from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing
from loraweave.routers.gates.selecting import (
    even_share,
    noisy,
    top_k_of_softmax,
    top_p_of_softmax,
    within_capacity,
    without_some,
)
from loraweave.routers.routing.choosing import top_k_softmax


class TokenGate(Gate):
    """w = softmax(r x / temperature) over the `top_k` highest scores of each token, with r_EI; in fp32 or better.

    `top_k` None is all experts; or each token has the fewest whose probabilities sum to `top_p`. Softmax, then the best k,
    then made to sum to 1 is the same; with `sums_to_one` False the softmax of all is kept as it is. In training alone,
    `noise` adds normal noise with the standard deviation softplus(n x), n_EI learned, before the softmax; `expert_dropout`
    is the probability with which a token does without an expert; and `capacity` lets each expert have, of a row, that many
    times its even share of tokens, the first ones or with `prioritised` those of the highest weights, and gives all others
    exactly 0 of it.

    The weighing's scores are what the softmax was taken of.
    """

    # the softmax or the choice that made a weight 0 passes no gradient on
    skips = True

    def __init__(
        self,
        num_inputs: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        sums_to_one: bool = True,
        temperature: float = 1.0,
        noise: bool = False,
        expert_dropout: float = 0.0,
        capacity: float | None = None,
        prioritised: bool = False,
    ) -> None:
        if top_k is not None and top_p is not None:
            raise WeightingError(f"top_k is {top_k!r} and top_p {top_p!r}: choose by one of them, and leave the other None")
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.top_p = top_p
        self.sums_to_one = sums_to_one
        self.temperature = temperature
        self.expert_dropout = expert_dropout
        self.capacity = capacity
        self.prioritised = prioritised
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))
        self.n_EI = nn.Parameter(torch.empty(num_experts, num_inputs)) if noise else None

    def reset(self, generator: torch.Generator) -> None:
        """r_EI as torch draws a linear layer: uniform between -1/sqrt(I) and 1/sqrt(I); n_EI as 0."""
        bound = self.r_EI.shape[1] ** -0.5
        with torch.no_grad():
            self.r_EI.uniform_(-bound, bound, generator=generator)
            if self.n_EI is not None:
                self.n_EI.zero_()

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        x_BTI = x_BTI.to(self.r_EI.dtype)
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.temperature != 1.0:
            scores_BTE = scores_BTE / self.temperature
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        if self.training and self.expert_dropout:
            scores_BTE = without_some(scores_BTE, self.expert_dropout, self.top_k or 1)
        w_BTE = self._chosen(scores_BTE)
        if self.training and self.capacity is not None:
            real_BT = call.real_of(x_BTI)
            real_BT = x_BTI.new_ones(x_BTI.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
            capacity_B = even_share(real_BT, self.num_experts, self.top_k or self.num_experts, self.capacity)
            w_BTE = within_capacity(w_BTE, capacity_B, real_BT, prioritised=self.prioritised)
        return Weighing(w_BTE, scores_BTE)

    def _chosen(self, scores_BTE: Tensor) -> Tensor:
        if self.top_p is not None:
            w_BTE = top_p_of_softmax(scores_BTE, self.top_p)
            return w_BTE / w_BTE.sum(dim=-1, keepdim=True) if self.sums_to_one else w_BTE
        if self.sums_to_one or self.top_k is None:
            return top_k_softmax(scores_BTE, self.top_k)
        return top_k_of_softmax(scores_BTE, self.top_k)
