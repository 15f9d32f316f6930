"""MoLA (Gao et al. 2024, arXiv 2402.08562): token-level top-k, with more experts in higher layers."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.extend import Count, NonNegative, get
from loraweave.extend.recipes import ExpertShape, Recipe, Site, TokenGate
from loraweave.extend.routing import Step, block_of

mixtral = get("losses", "mixtral")


@dataclass(frozen=True, kw_only=True)
class Mola(Recipe):
    """A mixture with w = softmax over the `top_k` highest of r x, for each token and site.

    `num_experts` are the experts of a site in each of as many groups of consecutive blocks, of nearly equal size: the
    published (2, 4, 6, 8). There are at most as many groups as blocks.

    `balance` times the sum over blocks of E * sum over e of s_e p_e is added, as in the released code: s_e is the share of e
    in all choices that real tokens made at the block's sites, p_e the mean of their softmax(r x). A block has 1 where all
    experts are alike, and a site outside the blocks is a block of its own. `as_released` includes padding. Published is
    0.001; of the two released scripts, the one for instructions adds the loss, that for ScienceQA only if asked.
    """

    # the balance loss was a mean over sites
    revision: ClassVar[int] = 2

    num_experts: tuple[Count, ...] = (2, 4, 6, 8)
    top_k: Count = 2
    balance: NonNegative = 0.001
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_experts:
            self.refuse("num_experts", "it takes a number for each group of blocks, as in (2, 4, 6, 8)")
        self.require_top_k(min(self.num_experts))

    @property
    def num_first_steps(self) -> int:
        return max(self.num_experts) + 1

    def shape(self, site: Site) -> ExpertShape:
        """Return the shape of experts in the site's group of blocks. Raises WeightingError for more groups than blocks."""
        if len(self.num_experts) > max(1, site.num_blocks):
            self.refuse(
                "num_experts", f"it takes a number for each group of blocks, and the model has {site.num_blocks} blocks"
            )
        return ExpertShape((self.rank,) * self.num_experts[_group(site, len(self.num_experts))])

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if not self.balance:
            return {}
        tokens: dict[Hashable, list[Tensor]] = {}
        for site, scores_BTE in step.scores.items():
            own_NE = scores_BTE.flatten(0, 1) if self.as_released else step.real(scores_BTE)
            # where experts begin as adapters, sites may have different numbers of experts
            tokens.setdefault((block_of(site) or site, own_NE.shape[1]), []).append(own_NE)
        losses = [mixtral(torch.cat(scores), self.top_k) / self.top_k for scores in tokens.values()]
        return {"balance": self.balance * torch.stack(losses).sum()}


def _group(site: Site, num_groups: int) -> int:
    """Return the group of a site's block, counted from 0; the last one for a site outside the blocks."""
    return num_groups - 1 if site.block is None else site.block * num_groups // site.num_blocks
