"""LAG (Fleshman and Van Durme 2025, arXiv 2507.05346): Arrow selects candidates, SpectR ranks them, the best is used."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from loraweave import ExpertPool, WeightingError
from loraweave.extend import Count, Positive, get
from loraweave.extend.routing import Members, ScoredRouter

CANDIDATES = 4
TOP_K = 1


class Lag(ScoredRouter):
    """A router by softmax over the `top_k` largest |b_e a_e x| among the `candidates` with the largest |v_e x|.

    v_e is the top right singular vector of b_e a_e. By default 4 candidates (all of a smaller pool), of which the best has
    weight 1, for each token and layer. Raises WeightingError for fewer candidates than top_k, or as `ScoredRouter`.
    """

    per_expert: ClassVar = {}
    counts: ClassVar[tuple[str, ...]] = ("top_k", "candidates")

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        candidates: Count | None = None,
        top_k: Count | None = None,
        temperature: Positive = 1.0,
    ) -> None:
        super().__init__(pool, top_k, temperature, default=TOP_K)
        self.candidates = min(max(CANDIDATES, self.top_k), len(self.experts)) if candidates is None else candidates
        if self.candidates < self.top_k:
            raise WeightingError(
                f"router 'lag' is to choose top_k={self.top_k} of candidates={self.candidates}; give as many, or more"
            )
        self.arrow: ScoredRouter = get("routers", "arrow")(pool)
        self.spectr: ScoredRouter = get("routers", "spectr")(pool)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return |b_e a_e x| (B, T, E) of each token's candidates, -inf for the other experts."""
        candidates_BTK = self.arrow.scores(x_BTI, layer).topk(self.candidates, dim=-1).indices
        scores_BTE = self.spectr.scores(x_BTI, layer)
        return torch.full_like(scores_BTE, -math.inf).scatter(-1, candidates_BTK, scores_BTE.gather(-1, candidates_BTK))
