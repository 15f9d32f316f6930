"""Arrow (Ostapenko et al. 2024, arXiv 2405.11157): each token to the experts whose direction it lies along."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.choosing import require_temperature, require_top_k, top_k_softmax, without
from loraweave.routers.routing.layer_tensors import LayerTensors
from loraweave.routers.routing.members import Members
from loraweave.routers.routing.token_router import TokenRouter, by_layer

TOP_K = 4


class Arrow(TokenRouter):
    """w = softmax over the `top_k` largest of |v_e x| / temperature, v_e the top right singular vector of b_e a_e.

    `top_k` is by default 4, as published, or all experts of a smaller pool.
    """

    def __init__(self, pool: ExpertPool | Members, *, top_k: int | None = None, temperature: float = 1.0) -> None:
        super().__init__(pool)
        self.top_k = min(TOP_K, len(self.experts)) if top_k is None else top_k
        self.temperature = temperature
        require_top_k("arrow", self.top_k, len(self.experts))
        require_temperature("arrow", temperature)
        self.directions_ = LayerTensors(by_layer(pool, _directions))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        v_EI = self.directions_[layer]
        scores_BTE = (x_BTI.to(v_EI.dtype) @ v_EI.T).abs()
        return top_k_softmax(without(scores_BTE, self.members.layers[layer].experts), self.top_k, self.temperature)


def _directions(pool: ExpertPool, layer: str) -> Tensor:
    """v_EI of one layer, unit vectors; zero for an expert without factors there."""
    factors = pool.stacked(layer)
    v_EI = torch.zeros(len(pool), factors.a_SI.shape[1])
    for place in range(len(pool)):
        mine_S = factors.owner_S == place
        if bool(mine_S.any()):
            _, r_RR = torch.linalg.qr(factors.b_OS[:, mine_S].double())
            v_EI[place] = torch.linalg.svd(r_RR @ factors.a_SI[mine_S].double(), full_matrices=False).Vh[0].float()
    return v_EI
