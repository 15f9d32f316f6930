"""Mixture-of-LoRAs (Feng et al., LREC-COLING 2024, arXiv 2403.03432): each layer predicts its input's domain, an adapter."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import ExpertPool
from loraweave.extend import NonNegative
from loraweave.extend.routing import InputGates, Members, Step, best_of, without
from loraweave.extensions.routers.by_sequence import BySequence, Decision
from loraweave.extensions.routers.routers.meteora import taught


class MixtureOfAdapters(InputGates, BySequence):
    """A router with w = 1 for the expert whose domain a layer predicts, else 0, by softmax(g x) with a g_EI by layer.

    With `decision` "sequence", as published, the expert of token t is the one whose mean of softmax(g x) over the row's
    real tokens 1..t is highest (`BySequence`); with "token" each token decides for itself.

    Domains are the experts: the dataset of `fit` names the expert of each row, and `eta` times the sum over layers of the
    cross-entropy of softmax(g x) with it, a mean over real tokens, is added to the loss of the model, whose gradient is that
    of the mean by which it decides (a straight-through estimate). `eta` is 0 or more, by default 0.1. A layer that a row's
    own expert does not update learns nothing from the row. g_EI starts as torch draws a linear layer.
    """

    needs_experts: ClassVar[bool] = True
    lr: ClassVar[float] = 1e-2

    def __init__(self, pool: ExpertPool | Members, *, eta: NonNegative = 0.1, decision: Decision = "sequence") -> None:
        super().__init__(pool)
        self.eta = eta
        self.follow(decision)

    def of_tokens(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; one of each token's weights is 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, best_of(scores_BTE, scores_BTE.softmax(dim=-1)))

    def summed(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE.softmax(dim=-1)

    def decided(self, mean_BTE: Tensor, scores_BTE: Tensor, layer: str) -> Tensor:
        w_BTE = best_of(without(mean_BTE, self.members.layers[layer].experts), mean_BTE)
        return self.note(layer, scores_BTE, w_BTE)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"domain": eta * the sum over layers of the cross-entropy with the row's own expert}, or {} without."""
        sums = [functional.cross_entropy(scores_NE, expert_N) for scores_NE, expert_N in taught(self, step) if len(expert_N)]
        return {"domain": self.eta * torch.stack(sums).sum()} if self.eta and sums else {}
