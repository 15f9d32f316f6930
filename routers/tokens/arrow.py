"""Arrow (Ostapenko et al. 2024, arXiv 2405.11157): each token goes to the experts whose direction it lies along."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.common.options import Count, Positive, Seed
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._forms import ScoredRouter
from loraweave.routers.tokens._members import LayerTensors, Members
from loraweave.routers.tokens._scores import factors_by_expert, power_iteration, top_direction, without

TOP_K = 4
# steps of PEFT's power iteration
STEPS = 15


class Arrow(ScoredRouter):
    """A router by softmax over the `top_k` largest |v_e x| / temperature, v_e the top right singular vector of b_e a_e.

    `top_k` is by default 4, as published, or all experts of a smaller pool. As published, x counts with its length, so that
    a layer with inputs ten times as long has a temperature a tenth as high; `input_norm="unit"` takes |v_e x| / |x|, between
    0 and 1, with which a temperature of 0.05 to 0.2 tells experts apart.

    `direction="power_iteration"` is PEFT's Arrow: 15 steps from a random vector, the same for all experts and layers, which
    `seed` draws. Where two singular values are close it is not the top right singular vector, and another seed routes
    differently; `top_k` is 3 there. "exact" has neither a seed nor a tolerance.

    Raises UnknownName for another direction or norm, and what `ScoredRouter` raises.
    """

    per_expert: ClassVar = {"directions_": None}

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        top_k: Count | None = None,
        temperature: Positive = 1.0,
        input_norm: Literal["none", "unit"] = "none",
        direction: Literal["exact", "power_iteration"] = "exact",
        seed: Seed = 0,
    ) -> None:
        super().__init__(pool, top_k, temperature, default=TOP_K)
        self.input_norm = input_norm
        self.direction = direction
        self.seed = seed
        self.directions_ = LayerTensors({})
        if (expert_pool := Members.pool_of(pool)) is not None:
            for layer in self.layers:
                self.directions_[layer] = _directions(expert_pool, layer, seed if direction == "power_iteration" else None)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return |v_e x|, -inf for experts that leave the layer alone."""
        v_EI = self.directions_[layer]
        x_BTI = x_BTI.to(v_EI.dtype)
        return self._scores(x_BTI @ v_EI.T, x_BTI, layer)

    def directions(self, layer: str) -> Tensor:
        """Return v_EI of the layer, unit vectors; zeros for an expert without factors there."""
        return self.directions_[layer]

    def weights_along(self, z_BTP: Tensor, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE, given the projections z = x v^T, (B, T, E), of a layer's input x_BTI."""
        return self.chosen(self._scores(z_BTP, x_BTI, layer))

    def _scores(self, z_BTE: Tensor, x_BTI: Tensor, layer: str) -> Tensor:
        scores_BTE = z_BTE.abs()
        if self.input_norm == "unit":
            # 0 stays 0
            scores_BTE = scores_BTE / x_BTI.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z_BTE.dtype).tiny)
        return without(scores_BTE, self.members.layers[layer].experts)


def _directions(pool: ExpertPool, layer: str, seed: int | None) -> Tensor:
    """Return v_EI of one layer, unit vectors; zeros for an expert without factors there."""
    num_inputs = Members.of(pool).layers[layer].num_inputs
    v_EI = torch.zeros(len(pool), num_inputs)
    for place, a_RI, b_OR in factors_by_expert(pool, layer):
        if seed is None:
            v_EI[place] = top_direction(a_RI, b_OR)
        else:
            start_I = torch.randn(num_inputs, generator=torch.Generator().manual_seed(seed))
            v_EI[place] = power_iteration(a_RI, b_OR, start_I, STEPS)
    return v_EI
