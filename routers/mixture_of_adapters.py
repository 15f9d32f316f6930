"""Mixture-of-LoRAs (Feng et al., LREC-COLING 2024, arXiv 2403.03432): each layer learns which adapter's domain it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.errors import WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.choosing import straight_through
from loraweave.routers.routing.input_gates import InputGates, drawn
from loraweave.routers.routing.learned_router import Step
from loraweave.routers.routing.members import Members


class MixtureOfAdapters(InputGates):
    """w = 1 for the expert with the highest score g x, 0 for the others; g_EI is each layer's own, drawn as torch draws it.

    Domains are the experts: the dataset of `fit` names the expert of each row, and `eta` times the sum over layers of the
    cross-entropy of softmax(g x) with it, a mean over real tokens, is added to the loss of the model, whose gradient is that
    of the softmax (a straight-through estimate). `eta` is 0 or more, by default 0.1. Layers that a row's own expert leaves
    alone learn nothing of it.

    Each token decides for itself. The published router takes one decision for a whole sequence, by its mean over the tokens,
    which for a text that is still being written would depend on tokens to come. Raises WeightingError for another `eta`.
    """

    needs_experts: ClassVar[bool] = True

    def __init__(self, pool: ExpertPool | Members, *, eta: float = 0.1) -> None:
        if not 0 <= eta < math.inf:
            raise WeightingError(f"eta of router 'mixture_of_adapters' is {eta!r}; it is a coefficient of a loss, 0 or more")
        super().__init__(pool, drawn)
        self.eta = eta

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE; one of each token's is 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, straight_through(scores_BTE))

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """{"domain": eta * the sum over layers of the cross-entropy with each row's own expert}."""
        sums = [
            functional.cross_entropy(scores_BTE[real_BT], step.expert_B[:, None].expand_as(real_BT)[real_BT])
            for layer, scores_BTE in step.scores.items()
            if bool((real_BT := self._taught(step, layer)).any())
        ]
        return {"domain": self.eta * torch.stack(sums).sum()} if self.eta and sums else {}

    def _taught(self, step: Step, layer: str) -> Tensor:
        """real_BT: the tokens of rows whose own expert updates the layer."""
        present_P = torch.tensor(self.members.layers[layer].experts, device=step.expert_B.device)
        return step.mask_BT.bool() & torch.isin(step.expert_B, present_P)[:, None]
