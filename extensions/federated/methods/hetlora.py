"""Aggregation of clients of different ranks in factor space: zero padding, weights by norm (HetLoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch
from torch.nn.functional import pad

from loraweave import Factors
from loraweave.extend import algebra, traits
from loraweave.extend.merging import Experts, Weights, shares, surveys, terms, weighted_bias


def survey(layers: Iterable[Experts], weights: Weights, *, norms: Literal["model", "layer"] = "model") -> list[float] | None:
    """Return the norm of each expert's update, all layers together; None when `norms` is "layer"."""
    if norms == "layer":
        return None
    squares = [0.0] * len(weights)
    for experts in layers:
        for place, factors in enumerate(experts):
            squares[place] += 0.0 if factors is None else algebra.norm(factors) ** 2
    return [square**0.5 for square in squares]


@surveys(survey)
@traits("shares", "by_factors")
def hetlora(
    experts: Experts, weights: Weights, *, norms: Literal["model", "layer"] = "model", survey: Sequence[float] | None = None
) -> Factors:
    """Return one layer's sum of p_e a_e and sum of p_e b_e, each padded with zeros to the largest rank.

    p_e = w_e |D_e| / sum of w_j |D_j| with the Frobenius norm of the update (Cho et al. 2024, arXiv 2401.06432); weights of
    1 are the paper's, and only proportions count. `norms` takes the norm over all layers of an expert ("model") or of each
    layer apart ("layer"). `survey` has the norms of the whole model; without it this layer is the model. Where every norm is
    0 the p_e are the w_e over their sum. An expert without the layer has zeros there. Biases sum with p_e.

    Not a mean of updates: a_e and b_e of different experts multiply, and the result depends on how each update is split and
    ordered. `flexlora` is the exact counterpart.
    """
    values = shares(weights)
    terms_E = terms(experts, values)
    if norms == "layer" or survey is None:
        survey = [0.0 if factors is None else algebra.norm(factors) for factors in experts]
    products = [norm * value for norm, value in zip(survey, values, strict=True)]
    parts = shares(products if any(products) else values)
    terms_E = [replace(term, weight=parts[term.place]) for term in terms_E]
    rank = max(term.factors.rank for term in terms_E)
    a_RI = reduce(torch.add, [pad(t.factors.a_RI.double(), (0, 0, 0, rank - t.factors.rank)) * t.weight for t in terms_E])
    b_OR = reduce(torch.add, [pad(t.factors.b_OR.double(), (0, rank - t.factors.rank)) * t.weight for t in terms_E])
    return replace(terms_E[0].factors, a_RI=a_RI.float(), b_OR=b_OR.float(), bias_O=weighted_bias(terms_E))
