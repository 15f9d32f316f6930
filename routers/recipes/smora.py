"""SMoRA (Zhao et al. 2025, arXiv 2501.15103): every rank of one LoRA is an expert, and a token gets the best few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.common.options import Count, NonNegative
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site, balance_term
from loraweave.routers.recipes._token_gates import TokenGate
from loraweave.routers.tokens._learned import Step


@dataclass(frozen=True, kw_only=True)
class Smora(Recipe):
    """y = y0 + alpha / rank * B diag(w) A x, where w is softmax(r x) for the `top_k` ranks of the highest r x, and 0 else.

    `rank` ranks make one LoRA, of which a token uses `top_k`: 8 of 64 by default, which is ours. As published, a bias that
    training moves against the busy ranks enters their choice. It would be a state that no gradient moves, which neither
    checkpoints nor several processes share; `balance` times the loss `mixtral` takes its place.
    """

    rank: Count = 64
    top_k: Count = 8
    balance: NonNegative = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.rank)

    @property
    def num_first_steps(self) -> int:
        # tokens have few of the ranks
        return self.rank + 1

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((1,) * self.rank)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k, sums_to_one=False)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, self.top_k)
