"""MoRAL (Yang et al. 2024, arXiv 2402.11260): top-k experts for lifelong learning from questions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.routers.recipes._recipe import FEED_FORWARD, EvenRecipe, Site, balance_term
from loraweave.routers.recipes._token_gates import TokenGate
from loraweave.routers.tokens._learned import Step


@dataclass(frozen=True, kw_only=True)
class Moral(EvenRecipe):
    """w = softmax over the `top_k` highest of r x, for each token and site of the feed-forward layers.

    What sets MoRAL apart is what it learns from, pairs of a question and its answer one after the other, and how that is
    measured; its mixture is this plain one. `balance` times the mean over sites of the loss `mixtral` may be added, by
    default nothing. The defaults of the number of experts, k and the rank are ours.
    """

    top_k: int = 2
    balance: float = 0.0
    target_modules: tuple[str, ...] = FEED_FORWARD

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_coefficient("balance")
        self.require_count("top_k", self.num_experts)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, self.top_k)
