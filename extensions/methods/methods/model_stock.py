"""The mean of updates, drawn towards the base model as far as their angles say (Model Stock)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend.merging import Experts, Weights, combination, gram, terms


def model_stock(
    experts: Experts, weights: Weights, *, angles: Literal["mean_cosine", "mean_angle"] = "mean_cosine"
) -> Factors:
    """Return one layer's t/N * sum of w_e D_e with t = N cos A / (1 + (N-1) cos A), clamped to [0, 1].

    Jang et al. 2024, arXiv 2403.19522; A is the angle between updates, and for more than two that of the mean cosine over
    all pairs (`angles`="mean_cosine", as in mergekit) or the mean angle ("mean_angle", as in FusionBench). The paper's
    weights are all 1; others multiply the updates first. N counts the experts with an update other than zero in this layer;
    one alone has t = 1.

    Unrelated LoRA updates are nearly orthogonal: then t is near 0 and the result near the base model. A mean cosine below 0,
    for which mergekit gives a negative t, gives an update of rank 0 here. Exact, of rank sum of R_e; biases take the
    coefficients of the updates.
    """
    terms_E = terms(experts, weights)
    updates = [term.factors for term in terms_E]
    w_E = torch.tensor([term.weight for term in terms_E], dtype=torch.float64)
    inner_EE = gram(updates) * w_E[:, None] * w_E
    directed = inner_EE.diagonal() > 0.0
    num = int(directed.sum())
    share = _ratio(inner_EE[directed][:, directed], angles) / num if num else 1.0 / len(terms_E)
    return combination(updates, (share * w_E).tolist())


def _ratio(inner_EE: Tensor, angles: str) -> float:
    """Return the factor t, 0 to 1, for updates with this Gram matrix (positive diagonal); `angles` as in `model_stock`."""
    num = len(inner_EE)
    if num == 1:
        return 1.0
    norm_E = inner_EE.diagonal().sqrt()
    first, second = torch.triu_indices(num, num, offset=1)
    cosines = (inner_EE / norm_E / norm_E[:, None])[first, second].clamp(-1.0, 1.0)
    cosine = float(cosines.mean() if angles == "mean_cosine" else cosines.acos().mean().cos())
    # at a cosine of -1/(N-1) the formula has a pole; all of that side is clamped to 0
    return min(num * cosine / (1.0 + (num - 1) * cosine), 1.0) if cosine > 0.0 else 0.0
