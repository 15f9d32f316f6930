"""SpectR (Fleshman and Van Durme 2025, arXiv 2504.03454): each token to the experts that change it most."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from loraweave.common.options import Count, Positive
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._forms import ScoredRouter
from loraweave.routers.tokens._members import LayerTensors, Members
from loraweave.routers.tokens._router import by_layer
from loraweave.routers.tokens._scores import core, parts, without

TOP_K = 4


class Spectr(ScoredRouter):
    """w = softmax over the `top_k` largest of |b_e a_e x| / temperature, the exact length of what each expert would add.

    All singular directions count with their strengths, where Arrow's takes one without. The update is refactored so that
    only R numbers an expert are made for a token: with b = q r, |b a x| = |r a x|. `top_k` is by default 4, or all experts
    of a smaller pool. Raises what `ScoredRouter` raises.
    """

    per_expert: ClassVar = {"cores_": "owners_"}

    def __init__(self, pool: ExpertPool | Members, *, top_k: Count | None = None, temperature: Positive = 1.0) -> None:
        super().__init__(pool, top_k, temperature, default=TOP_K)
        self.cores_ = LayerTensors(by_layer(pool, _cores))
        self.owners_ = LayerTensors(by_layer(pool, _owners))

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """|b_e a_e x|, -inf for experts that leave the layer alone."""
        c_SI, owner_S = self.cores_[layer], self.owners_[layer]
        squares_BTS = (x_BTI.to(c_SI.dtype) @ c_SI.T).square()
        zeros_BTE = squares_BTS.new_zeros(*squares_BTS.shape[:2], len(self.experts))
        squares_BTE = zeros_BTE.index_add(2, owner_S, squares_BTS)
        # the root of 0 has no gradient
        lengths_BTE = squares_BTE.clamp_min(torch.finfo(squares_BTE.dtype).tiny).sqrt()
        return without(lengths_BTE, self.members.layers[layer].experts)


def _cores(pool: ExpertPool, layer: str) -> Tensor:
    """c_SI: the experts' cores below each other."""
    rows = [core(a_RI, b_OR).float() for _, a_RI, b_OR in parts(pool, layer)]
    return torch.cat(rows) if rows else torch.zeros(0, Members.of(pool).layers[layer].num_inputs)


def _owners(pool: ExpertPool, layer: str) -> Tensor:
    """owner_S: the place of the expert of each row of the cores."""
    owned = [torch.full((min(b_OR.shape),), place) for place, _, b_OR in parts(pool, layer)]
    return torch.cat(owned) if owned else torch.zeros(0, dtype=torch.long)
