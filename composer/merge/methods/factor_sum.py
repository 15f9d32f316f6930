"""The weighted sum of factors, LoraHub's original form (Huang et al. 2023, arXiv 2307.13269): cross terms included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loraweave.errors import AdapterUnsupported, LayerMismatch
from loraweave.registry import traits
from loraweave.types import Factors


@traits("by_factors")
def factor_sum(experts: Sequence[Factors | None], weights: Sequence[float]) -> Factors | None:
    """One layer's A = sum of w_e a_e and B = sum of w_e b_e, hence the update sum over i, j of w_i w_j b_i a_j.

    This is not the weighted sum of updates: a single expert of weight w counts w^2, the sign of all weights cancels, and
    the result depends on how each update was split into a and b. The LoRA scale s is folded into b, so for experts of
    one scale this equals s * B_hat A_hat of the paper; experts of different scales each bring their own.

    None stands for an expert without this layer, which contributes zeros, and is the answer when nothing is left.
    Biases sum with weight w. Raises LayerMismatch for different ranks or shapes, AdapterUnsupported for a gain (DoRA,
    (IA)3), which is no product of factors.
    """
    terms = [(f, w) for f, w in zip(experts, weights, strict=True) if f is not None and w != 0.0]
    if not terms:
        return None
    first = terms[0][0]
    for factors, _ in terms:
        if not factors.bound or factors.gain_O is not None:
            raise AdapterUnsupported(
                "factor_sum mixes a and b alone, and an update with a gain or magnitude has more: use linear"
            )
        if factors.a_RI.shape != first.a_RI.shape or factors.b_OR.shape != first.b_OR.shape:
            raise LayerMismatch(
                "factor_sum needs equal ranks and shapes, but found a of (R, I) "
                f"{tuple(first.a_RI.shape)} and {tuple(factors.a_RI.shape)}: use linear, which takes any ranks"
            )
    biases = [factors.bias_O * weight for factors, weight in terms if factors.bias_O is not None]
    return replace(
        first,
        a_RI=torch.stack([factors.a_RI * weight for factors, weight in terms]).sum(dim=0),
        b_OR=torch.stack([factors.b_OR * weight for factors, weight in terms]).sum(dim=0),
        bias_O=torch.stack(biases).sum(dim=0) if biases else None,
    )
