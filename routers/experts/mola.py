"""MoLA (Gao et al. 2024, arXiv 2402.08562): token-level top-k, with more experts in higher layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.hub.whole_number import is_whole
from loraweave.routers.experts._recipe import ExpertShape, Recipe, Site
from loraweave.routers.experts._token_recipe import balanced
from loraweave.routers.gates.token_gate import TokenGate
from loraweave.routers.routing.learned_router import Step


@dataclass(frozen=True, kw_only=True)
class Mola(Recipe):
    """w = softmax over the `top_k` highest of r x, for each token and site.

    `num_experts` has the experts of as many groups of blocks, from the first to the last, as equal as they come: the
    published (2, 4, 6, 8). `balance` times the mean over sites of the loss `mixtral` is added, which is k where all experts
    are alike; the paper's 0.001 by default, and 0, as in the released code, with `as_released`.
    """

    num_experts: tuple[int, ...] = (2, 4, 6, 8)
    top_k: int = 2
    balance: float = 0.001
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_experts or not all(is_whole(count, 1) for count in self.num_experts):
            self.refuse("num_experts", "it has a whole number of at least 1 for each group of blocks, as in (2, 4, 6, 8)")
        self.require_count("top_k", min(self.num_experts))
        self.require_coefficient("balance")

    @property
    def num_first_steps(self) -> int:
        return max(self.num_experts) + 1

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts[_group(site, len(self.num_experts))])

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return balanced(0.0 if self.as_released else self.balance, step, self.top_k)


def _group(site: Site, num_groups: int) -> int:
    """The group of a site's block, counted from 0; a site outside the blocks is in the last one."""
    return num_groups - 1 if site.block is None else site.block * num_groups // site.num_blocks
