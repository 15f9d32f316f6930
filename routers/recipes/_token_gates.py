"""The gate that weighs each token by the input of its layer, and the functions that turn its scores into weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.errors import WeightingError
from loraweave.routers.recipes._gate import Call, Gate, Weighing, draw_linear
from loraweave.routers.tokens._scores import top_k_softmax, top_p_of_softmax


class TokenGate(Gate):
    """A gate with w = softmax(r x) over each token's `top_k` highest scores, with r_EI; in fp32 or better.

    `top_k` None takes all experts; `top_p` takes the fewest whose probabilities sum to that. The best k of the softmax over
    all, divided by their sum, are the same; with `sums_to_one` False they are not divided. In training alone,
    `noise` adds normal noise with the standard deviation softplus(n x), n_EI learned, before the softmax; and `capacity`
    lets each expert have, of a row, that many times its even share of tokens, and gives all others exactly 0 of it.

    The weighing's scores are what the softmax was taken of. A subclass may have other `scores`, or `choose` or `limit` its
    own way.
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
        noise: bool = False,
        capacity: float | None = None,
    ) -> None:
        if top_k is not None and top_p is not None:
            raise WeightingError(f"top_k is {top_k!r} and top_p {top_p!r}: choose by one of them, and leave the other None")
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.top_p = top_p
        self.sums_to_one = sums_to_one
        self.capacity = capacity
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))
        self.n_EI = nn.Parameter(torch.empty(num_experts, num_inputs)) if noise else None

    def reset(self, generator: torch.Generator) -> None:
        """Draw r_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I), and set n_EI to 0."""
        draw_linear(self.r_EI, generator)
        if self.n_EI is not None:
            nn.init.zeros_(self.n_EI)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = self.scores(x_BTI.to(self.r_EI.dtype))
        w_BTE = self.choose(scores_BTE)
        if self.training and self.capacity is not None:
            real_BT = call.real_of(x_BTI)
            real_BT = x_BTI.new_ones(x_BTI.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
            capacity_B = even_share(real_BT, self.num_experts, self.top_k or self.num_experts, self.capacity)
            w_BTE = self.limit(w_BTE, capacity_B, real_BT)
        return Weighing(w_BTE, scores_BTE)

    def scores(self, x_BTI: Tensor) -> Tensor:
        """Return scores_BTE of the experts: r x, in training with its noise."""
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        return scores_BTE

    def choose(self, scores_BTE: Tensor) -> Tensor:
        """Return w_BTE for these scores."""
        if self.top_p is not None:
            w_BTE = top_p_of_softmax(scores_BTE, self.top_p)
            return w_BTE / w_BTE.sum(dim=-1, keepdim=True) if self.sums_to_one else w_BTE
        if self.sums_to_one or self.top_k is None:
            return top_k_softmax(scores_BTE, self.top_k)
        return top_k_of_softmax(scores_BTE, self.top_k)

    def limit(self, w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor) -> Tensor:
        """Return w_BTE with 0 where an expert has had as many of the row's real tokens as its capacity: the first stay."""
        return within_capacity(w_BTE, capacity_B, real_BT)


def top_k_of_softmax(scores_BTE: Tensor, top_k: int) -> Tensor:
    """Return w_BTE: softmax over all experts, kept for the `top_k` highest of each token and 0 for the others.

    It sums to less than 1, so that a single expert's weight, too, has a gradient to its scores (Switch Transformers, Fedus
    et al. 2021, arXiv 2101.03961).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    best = p_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values)


def noisy(scores_BTE: Tensor, spread_BTE: Tensor) -> Tensor:
    """Add normal noise with the standard deviation softplus(spread) to scores (Shazeer et al. 2017, arXiv 1701.06538)."""
    return scores_BTE + torch.randn_like(scores_BTE) * functional.softplus(spread_BTE)


def within_capacity(w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Return the weights with 0 for every token of a row after the first `capacity_B` real ones that an expert got.

    Weights that stay are as they were. A token depends on others in its row, so this is for training alone.
    """
    chosen_BTE = w_BTE.detach() != 0
    if real_BT is not None:
        chosen_BTE = chosen_BTE & real_BT[..., None]
    return w_BTE * (chosen_BTE.cumsum(dim=1) <= capacity_B[:, None, None])


def even_share(real_BT: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """Return capacity_B: `factor` times each expert's tokens of a row if all have equally many, rounded up."""
    # in this order a factor of 1 is exact
    return (real_BT.sum(dim=1) * (factor * top_k) / num_experts).ceil()
