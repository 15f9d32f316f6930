"""What recipes share whose sites all have the same number of experts, each token its own weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.routers.losses.mixtral import mixtral
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site, by_layer
from loraweave.routers.tokens._learned import Step


@dataclass(frozen=True, kw_only=True)
class TokenRecipe(Recipe):
    """`num_experts` experts of the recipe's rank at each site."""

    num_experts: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")

    @property
    def num_first_steps(self) -> int:
        # tokens may have few of the experts
        return self.num_experts + 1

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts)

    def require_capacity(self) -> None:
        """Raises WeightingError for an option `capacity` that is neither above 0 nor None."""
        capacity = self.options["capacity"]
        if capacity is not None and not 0 < capacity < math.inf:
            way_out = "it is a multiple of an expert's even share of a row's tokens, above 0, or None for no limit"
            self.refuse("capacity", way_out)


def balanced(coefficient: float, step: Step, top_k: int) -> Mapping[str, Tensor]:
    """{"balance": coefficient * the mean over sites of the loss `mixtral`}, of `switch` for a `top_k` of 1; {} for 0."""
    if not coefficient:
        return {}
    return {"balance": coefficient * by_layer(step, lambda scores_NE: mixtral(scores_NE, top_k)).mean()}
