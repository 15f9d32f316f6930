"""A gate for each token some of whose experts are left out in training: at random, or where they have had their share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loraweave.extend import TokenGate


class LimitedGate(TokenGate):
    """A `TokenGate` that in training lacks experts: `expert_dropout` is the probability with which a token does without one.

    At least `top_k` always stay. Of a `capacity`, an expert has the first tokens of a row, or with `prioritised` those that
    it weighs most.
    """

    def __init__(
        self, num_inputs: int, num_experts: int, *, expert_dropout: float = 0.0, prioritised: bool = False, **choice: Any
    ) -> None:
        super().__init__(num_inputs, num_experts, **choice)
        self.expert_dropout = expert_dropout
        self.prioritised = prioritised

    def scores(self, x_BTI: Tensor) -> Tensor:
        scores_BTE = super().scores(x_BTI)
        if self.training and self.expert_dropout:
            scores_BTE = without_some(scores_BTE, self.expert_dropout, self.top_k or 1)
        return scores_BTE

    def limit(self, w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor) -> Tensor:
        if self.prioritised:
            return heaviest_within_capacity(w_BTE, capacity_B, real_BT)
        return super().limit(w_BTE, capacity_B, real_BT)


def without_some(scores_BTE: Tensor, share: float, least: int = 1) -> Tensor:
    """Set scores of each token to -inf, each with probability `share` and drawn for it alone; `least` always stay."""
    drawn_BTE = torch.rand_like(scores_BTE)
    stays_BTE = (drawn_BTE >= share).scatter(-1, drawn_BTE.topk(least, dim=-1).indices, True)
    return scores_BTE.masked_fill(~stays_BTE, -math.inf)


def heaviest_within_capacity(w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Return the weights with 0 but for the `capacity_B` real tokens of a row that an expert weighs most.

    They may be anywhere in the row, the earlier of equal ones (Batch Prioritized Routing, Riquelme et al. 2021, arXiv
    2106.05974, within a row). A token depends on others in its row, so this is for training alone.
    """
    chosen_BTE = w_BTE.detach() != 0
    if real_BT is not None:
        chosen_BTE = chosen_BTE & real_BT[..., None]
    falling_BTE = (w_BTE.detach() * chosen_BTE).argsort(dim=1, descending=True, stable=True)
    return w_BTE * (falling_BTE.argsort(dim=1) + 1 <= capacity_B[:, None, None])
