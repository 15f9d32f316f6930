"""Weights from each adapter's nearness to the input: LoraRetriever's compositions and token-level adaptation's softmax.

LoraRetriever (Zhao et al. 2024, arXiv 2402.09997) takes the nearest adapter ("selection"), or the k nearest with 1/k each,
as a sum of updates ("mixture") or of the factors apart ("fusion"). Token-level adaptation (Belofsky 2023, arXiv 2311.10847)
takes softmax(cosine / temperature), the cosine being that of the input's embedding and the mean of an adapter's examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from loraweave.common.names import unknown_expert
from loraweave.common.options import Count, Positive
from loraweave.errors import WeightingError
from loraweave.routers.searches._solver import ClosedForm
from loraweave.routers.tokens.similarity import Similarity as SimilarityRouter

# LoraRetriever's k of its mixtures and fusions
NEAREST = 3
TEMPERATURE = 0.1


@dataclass(eq=False, kw_only=True)
class Similarity(ClosedForm):
    """Weights that sum to 1 from `scores`, {expert: score}, higher is nearer; experts without a score get 0.

    `form`: "selection" is the nearest alone; "mixture" and "fusion" are 1/n for the `nearest` (by default 3, or all that
    have a score); "softmax" is exp(score / `temperature`), normalised, over the `nearest` ones (by default all of them).
    Of equal scores the one named first is nearer. `merge_method` is the method that composes the weights as published.

    Raises UnknownExpert for scores of other experts, WeightingError for scores that are not finite, for none, and for
    `nearest` beyond their number.
    """

    token_router: ClassVar[type] = SimilarityRouter

    scores: Mapping[str, float]
    form: Literal["selection", "mixture", "fusion", "softmax"] = "softmax"
    nearest: Count | None = None
    temperature: Positive = TEMPERATURE

    def _weights(self) -> Mapping[str, float]:
        scores = self.scores
        _require_scores(scores, self.experts)
        count = _count(self.form, self.nearest, len(scores))
        # fusion sums a and b apart, including the cross terms b_i a_j
        self.merge_method = "factor_sum" if self.form == "fusion" else "linear"
        names = sorted(scores, key=lambda name: -scores[name])[:count]
        if self.form != "softmax":
            return dict.fromkeys(names, 1 / count)
        return dict(zip(names, _softmax([scores[name] for name in names], self.temperature), strict=True))


def _require_scores(scores: Mapping[str, float], experts: Sequence[str]) -> None:
    if not scores:
        raise WeightingError("no expert has a score, so none is nearest; compose with the base model instead")
    for name, score in scores.items():
        if name not in experts:
            raise unknown_expert(name, dict.fromkeys(experts))
        if not math.isfinite(score):
            raise WeightingError(
                f"the score of {name!r} is {score}; scores are finite. A key made of no examples at all gives NaN: leave "
                "such an expert out"
            )


def _count(form: str, nearest: int | None, num_scored: int) -> int:
    """Return how many experts get a weight above 0. Raises WeightingError for a `nearest` that does not fit the form."""
    if form == "selection" and nearest not in (None, 1):
        raise WeightingError(f"nearest is {nearest!r}, but a selection is of 1 expert; 'mixture' takes several")
    if nearest is None:
        return {"selection": 1, "softmax": num_scored}.get(form, min(NEAREST, num_scored))
    if nearest > num_scored:
        raise WeightingError(f"nearest is {nearest}, but {num_scored} experts have a score; take that at most")
    return nearest


def _softmax(scores: Sequence[float], temperature: float) -> list[float]:
    highest = max(scores)
    powers = np.array([math.exp((score - highest) / temperature) for score in scores])
    return [float(power) for power in powers / powers.sum()]
