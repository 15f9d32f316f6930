"""LLaVA-MoLE (Chen, Jie and Ma 2024, arXiv 2401.16160): one expert of the feed-forward for each token."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.extend import Count, NonNegative
from loraweave.extend.recipes import FEED_FORWARD, EvenRecipe, Site, balance_term
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.limited_gate import LimitedGate


@dataclass(frozen=True, kw_only=True)
class LlavaMole(EvenRecipe):
    """A mixture of one expert for each token and feed-forward site: w = softmax(r x) for the highest, 0 for the others.

    The gate learns by that probability alone: which expert is the best has no gradient. `balance` times the mean over sites
    of the loss `switch`, 1 where all experts are alike, is added. Published, for three kinds of data: 3 experts of rank 32.
    """

    rank: Count = 32
    num_experts: Count = 3
    balance: NonNegative = 0.01
    target_modules: tuple[str, ...] = FEED_FORWARD

    def gate(self, site: Site, num_experts: int) -> LimitedGate:
        return LimitedGate(site.num_inputs, num_experts, top_k=1, sums_to_one=False)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balance_term(self.balance, step, 1)
