"""The first step of every merge method: leave out the experts that do not count, and refuse those that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.errors import AdapterUnsupported, LayerMismatch
from loraweave.types import Factors

# one layer's update of each expert, None for an expert without the layer; a method gets at least one of weight other than 0
Experts = Sequence[Factors | None]
Weights = Sequence[float]


@dataclass(frozen=True, eq=False)
class Term:
    """One expert that counts: its factors, its weight (finite, not zero), and its place among the experts given."""

    factors: Factors
    weight: float
    place: int


def terms(experts: Experts, weights: Weights) -> list[Term]:
    """Return the experts that have the layer and a weight other than zero, in the order given; all of one shape and kind.

    Raises AdapterUnsupported for an update that depends on the base layer: one with a gain, DoRA's magnitude or a trained
    base bias. Raises LayerMismatch, with both shapes, for updates that differ.
    """
    terms_E = [
        Term(factors, float(weight), place)
        for place, (factors, weight) in enumerate(zip(experts, weights, strict=True))
        if factors is not None and weight != 0.0
    ]
    for term in terms_E:
        if not term.factors.bound or term.factors.gain_O is not None:
            raise AdapterUnsupported(
                "the method works on the update as a matrix, and DoRA's magnitude, a gain or a trained base bias needs the "
                "base layer: turn the adapter into a plain LoRA with the model first (lw.to_lora), or use linear"
            )
        if signature(term.factors) != signature(terms_E[0].factors):
            raise LayerMismatch(
                f"the method cannot combine updates of (O, I, kind, kernel) {signature(terms_E[0].factors)} and "
                f"{signature(term.factors)}"
            )
    return terms_E


def terms_of_one_rank(experts: Experts, weights: Weights, *, twin: str) -> list[Term]:
    """Return `terms` that all have one rank. Raises LayerMismatch, naming the `twin` on updates, for different ranks."""
    terms_E = terms(experts, weights)
    for term in terms_E:
        if term.factors.rank != terms_E[0].factors.rank:
            raise LayerMismatch(
                f"the method mixes a and b apart and needs equal ranks, but found {terms_E[0].factors.rank} and "
                f"{term.factors.rank}: use {twin}, which works on the updates and takes any ranks"
            )
    return terms_E


def signature(factors: Factors) -> tuple[int, int, str, tuple[int, ...]]:
    return factors.b_OR.shape[0], factors.a_RI.shape[1], factors.kind, factors.kernel


def weighted_bias(found: Sequence[Term]) -> Tensor | None:
    """Return the sum of w_e bias_e over the terms that have one, fp32; None when no term has."""
    parts = [term.factors.bias_O.double() * term.weight for term in found if term.factors.bias_O is not None]
    return torch.stack(parts).sum(dim=0).float() if parts else None
