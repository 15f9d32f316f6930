"""The form of routers whose weights are a softmax over the experts with the highest scores, token by token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.choosing import require_temperature, require_top_k, top_k_softmax
from loraweave.routers.routing.members import Members
from loraweave.routers.routing.token_router import TokenRouter


class ScoredRouter(TokenRouter):
    """w = softmax(scores / temperature) over the `top_k` highest scores of each token; the others get 0.

    Without a `top_k` it is `default`, or all experts of a smaller pool. Raises WeightingError for a top_k above the pool
    and a temperature that is not above 0.
    """

    counts: ClassVar[tuple[str, ...]] = ("top_k",)

    def __init__(self, pool: ExpertPool | Members, top_k: int | None, temperature: float, *, default: int) -> None:
        super().__init__(pool)
        self.top_k = min(default, len(self.experts)) if top_k is None else top_k
        self.temperature = temperature
        require_top_k(self.name, self.top_k, len(self.experts))
        require_temperature(self.name, temperature)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """scores_BTE in fp32 or better, -inf for experts that leave the layer alone."""
        raise NotImplementedError

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE; they sum to 1."""
        return self.chosen(self.scores(x_BTI, layer))

    def chosen(self, scores_BTE: Tensor) -> Tensor:
        """w_BTE of scores."""
        return top_k_softmax(scores_BTE, self.top_k, self.temperature)
