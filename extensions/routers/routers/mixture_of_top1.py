"""The one best expert of every token and layer, with weight 1: its update is added whole, as it was trained."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend import Members, ScoredRouter, TokenRouter, get


class MixtureOfTop1(TokenRouter):
    """A router with weight 1 for the expert of the highest score, 0 for the others; of equal scores the first expert.

    `score` names the router whose scores count. A probability below 1 in place of the 1 would shrink an update that was
    trained at its full strength (unit scale; Hard-Routed MoR-LoRA, arXiv 2606.31413).
    """

    per_expert: ClassVar = {}

    def __init__(self, pool: ExpertPool | Members, *, score: Literal["arrow", "spectr"] = "arrow") -> None:
        super().__init__(pool)
        self.score = score
        self.scored: ScoredRouter = get("routers", score)(pool)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE, all 0 or 1."""
        scores_BTE = self.scored.scores(x_BTI, layer)
        best_BT1 = scores_BTE.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(scores_BTE).scatter(-1, best_BT1, 1.0)
