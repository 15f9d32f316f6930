"""The gate that weighs each token by the input of its layer, and the functions that turn its scores into weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.errors import WeightingError
from loraweave.routers.recipes._gate import Call, Gate, Weighing, draw_linear
from loraweave.routers.tokens._scores import top_k_softmax, top_p_of_softmax


class TokenGate(Gate):
    """A gate with w = softmax(r x / temperature) over each token's `top_k` highest scores, with r_EI; in fp32 or better.

    `top_k` None takes all experts; `top_p` takes the fewest whose probabilities sum to that. The best k of the softmax over
    all, divided by their sum, are the same; with `sums_to_one` False they are not divided. In training alone,
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
        """Draw r_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I), and set n_EI to 0."""
        draw_linear(self.r_EI, generator)
        if self.n_EI is not None:
            nn.init.zeros_(self.n_EI)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        x_BTI = x_BTI.to(self.r_EI.dtype)
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.temperature != 1.0:
            scores_BTE = scores_BTE / self.temperature
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        if self.training and self.expert_dropout:
            scores_BTE = without_some(scores_BTE, self.expert_dropout, self.top_k or 1)
        w_BTE = self._choose(scores_BTE)
        if self.training and self.capacity is not None:
            real_BT = call.real_of(x_BTI)
            real_BT = x_BTI.new_ones(x_BTI.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
            capacity_B = even_share(real_BT, self.num_experts, self.top_k or self.num_experts, self.capacity)
            w_BTE = within_capacity(w_BTE, capacity_B, real_BT, prioritised=self.prioritised)
        return Weighing(w_BTE, scores_BTE)

    def _choose(self, scores_BTE: Tensor) -> Tensor:
        if self.top_p is not None:
            w_BTE = top_p_of_softmax(scores_BTE, self.top_p)
            return w_BTE / w_BTE.sum(dim=-1, keepdim=True) if self.sums_to_one else w_BTE
        if self.sums_to_one or self.top_k is None:
            return top_k_softmax(scores_BTE, self.top_k)
        return top_k_of_softmax(scores_BTE, self.top_k)


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


def without_some(scores_BTE: Tensor, share: float, least: int = 1) -> Tensor:
    """Set scores of each token to -inf, each with probability `share` and drawn for it alone; `least` always stay."""
    drawn_BTE = torch.rand_like(scores_BTE)
    stays_BTE = (drawn_BTE >= share).scatter(-1, drawn_BTE.topk(least, dim=-1).indices, True)
    return scores_BTE.masked_fill(~stays_BTE, -math.inf)


def within_capacity(
    w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None, *, prioritised: bool = False
) -> Tensor:
    """Return the weights with 0 for every token of a row after the first `capacity_B` real ones that an expert got.

    With `prioritised` an expert keeps those that it weighs most, wherever they are (Batch Prioritized Routing, Riquelme et
    al. 2021, arXiv 2106.05974, within a row), the earlier of equal ones. Weights that stay are as they were. A token depends
    on others in its row, so this is for training alone.
    """
    chosen_BTE = w_BTE.detach() != 0
    if real_BT is not None:
        chosen_BTE = chosen_BTE & real_BT[..., None]
    if prioritised:
        falling_BTE = (w_BTE.detach() * chosen_BTE).argsort(dim=1, descending=True, stable=True)
        place_BTE = falling_BTE.argsort(dim=1) + 1
    else:
        place_BTE = chosen_BTE.cumsum(dim=1)
    return w_BTE * (place_BTE <= capacity_B[:, None, None])


def even_share(real_BT: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """Return capacity_B: `factor` times each expert's tokens of a row if all have equally many, rounded up."""
    # in this order a factor of 1 is exact
    return (real_BT.sum(dim=1) * (factor * top_k) / num_experts).ceil()
