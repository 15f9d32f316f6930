"""SpectR (Fleshman and Van Durme 2025, arXiv 2504.03454): each token goes to the experts that change it most."""

from typing import ClassVar

import torch
from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend import Count, Positive
from loraweave.extend.routing import LayerTensors, Members, ScoredRouter, without
from loraweave.extensions.routers.outputs import output_factors

TOP_K = 4


class Spectr(ScoredRouter):
    """A router with w = softmax over the `top_k` largest |b_e a_e x| / temperature, the exact length of an expert's change.

    All singular directions count, with their strengths, while Arrow uses only the first, without its strength. The update is
    refactored so that only R numbers an expert are made for a token: with b = q r, |b a x| = |r a x|. `top_k` is by default
    4, or all experts of a smaller pool. Raises what `ScoredRouter` raises.
    """

    per_expert: ClassVar = {"cores_": "owners_"}

    def __init__(self, pool: ExpertPool | Members, *, top_k: Count | None = None, temperature: Positive = 1.0) -> None:
        super().__init__(pool, top_k, temperature, default=TOP_K)
        # the experts' r a below each other, and whose each row is
        self.cores_ = LayerTensors({})
        self.owners_ = LayerTensors({})
        if (expert_pool := Members.pool_of(pool)) is not None:
            for layer, routed in self.members.layers.items():
                self.cores_[layer], _, self.owners_[layer] = output_factors(expert_pool, layer, routed)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return |b_e a_e x| (B, T, E), -inf for experts that do not update the layer."""
        c_SI, owner_S = self.cores_[layer], self.owners_[layer]
        squares_BTS = (x_BTI.to(c_SI.dtype) @ c_SI.T).square()
        zeros_BTE = squares_BTS.new_zeros(*squares_BTS.shape[:2], len(self.experts))
        squares_BTE = zeros_BTE.index_add(2, owner_S, squares_BTS)
        # the root of 0 has no gradient
        lengths_BTE = squares_BTE.clamp_min(torch.finfo(squares_BTE.dtype).tiny).sqrt()
        return without(lengths_BTE, self.members.layers[layer].experts)
