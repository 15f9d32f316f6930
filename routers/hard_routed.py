"""Hard-Routed MoR-LoRA (Molavi et al. 2026, arXiv 2606.31413): each token to one whole adapter, learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.input_gates import InputGates, drawn
from loraweave.routers.routing.members import Members


class HardRouted(InputGates):
    """w = 1 for the expert with the highest score g x, exactly, and 0 for the others: every adapter acts at the scale that
    it was trained with. The gradient is that of softmax(g x) (a straight-through estimate), so that all scores learn.

    `shared`, as published, has one matrix g_EI for all layers of I inputs; without it each layer has its own. It starts as
    torch draws a linear layer. The published training also learns a small LoRA on the attention, which is no weight of an
    expert and is not here: train one with `train_adapters` and put it into the pool.
    """

    def __init__(self, pool: ExpertPool | Members, *, shared: bool = True) -> None:
        super().__init__(pool, drawn, shared=shared)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE; one of each token's is 1."""
        scores_BTE = self.scores(x_BTI, layer)
        p_BTE = scores_BTE.softmax(dim=-1)
        chosen_BTE = functional.one_hot(scores_BTE.argmax(dim=-1), len(self.experts)).to(p_BTE.dtype)
        if torch.is_grad_enabled() and p_BTE.requires_grad:
            # the difference is 0, but for its gradient
            chosen_BTE = chosen_BTE + (p_BTE - p_BTE.detach())
        return self.note(layer, scores_BTE, chosen_BTE)
