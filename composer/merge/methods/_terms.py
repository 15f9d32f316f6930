"""What every merge method does first: leave out the experts that do not count, and refuse those that do not fit."""

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
    """An expert that counts: its factors, its weight (finite, not zero), and its place among the experts given."""

    factors: Factors
    weight: float
    place: int


def terms(experts: Experts, weights: Weights) -> list[Term]:
    """The experts that have the layer and a weight other than zero, in the order given; all of one shape and kind.

    Raises AdapterUnsupported for an update that depends on the base layer: one with a gain, DoRA's magnitude or a trained
    base bias. Raises LayerMismatch, with both shapes, for updates that differ.
    """
    found = [
        Term(factors, float(weight), place)
        for place, (factors, weight) in enumerate(zip(experts, weights, strict=True))
        if factors is not None and weight != 0.0
    ]
    for term in found:
        if not term.factors.bound or term.factors.gain_O is not None:
            raise AdapterUnsupported(
                "the method works on the update as a matrix, and DoRA's magnitude, a gain or a trained base bias needs the "
                "base layer: turn the adapter into a plain LoRA with the model first (lw.to_lora), or use linear"
            )
        if signature(term.factors) != signature(found[0].factors):
            raise LayerMismatch(
                f"the method cannot combine updates of (O, I, kind, kernel) {signature(found[0].factors)} and "
                f"{signature(term.factors)}"
            )
    return found


def signature(factors: Factors) -> tuple[int, int, str, tuple[int, ...]]:
    return factors.b_OR.shape[0], factors.a_RI.shape[1], factors.kind, factors.kernel


def weighted_bias(found: Sequence[Term]) -> Tensor | None:
    """The sum of w_e bias_e over the terms that have one, fp32; None when no term has."""
    parts = [term.factors.bias_O.double() * term.weight for term in found if term.factors.bias_O is not None]
    return torch.stack(parts).sum(dim=0).float() if parts else None
