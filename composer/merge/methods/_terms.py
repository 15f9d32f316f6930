"""The first step of every merge method: leave out the experts that do not count, and refuse those that do not fit.

Methods whose weights are shares of a mean, and whose data says how the mean is taken, begin with `shares`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.composer.merge.statistics import LayerStatistics
from loraweave.errors import AdapterUnsupported, LayerMismatch, WeightingError
from loraweave.lowrank.algebra import all_finite
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


@dataclass(frozen=True, eq=False)
class Share:
    """One expert that takes part with a weight above zero; `term` is None for one whose update is zero in this layer."""

    term: Term | None
    weight: float
    seen: LayerStatistics


def shares(experts: Experts, weights: Weights, statistics: Sequence[LayerStatistics | None], *, part: str) -> list[Share]:
    """Return the experts that take part in a layer's mean, in the order given; empty when none has an update there.

    An expert without the layer is a zero update where its inputs were recorded there (collect_statistics(layers=...)),
    and has no part in the mean otherwise: it has seen nothing. Raises WeightingError for a negative weight and for an
    expert with the layer whose `part` of the statistics is missing, of another shape or not finite.
    """
    by_place = {term.place: term for term in terms(experts, weights)}
    result = []
    for place, (expert, weight, seen) in enumerate(zip(experts, weights, statistics, strict=True)):
        if weight == 0.0 or (expert is None and (seen is None or getattr(seen, part) is None)):
            continue
        if weight < 0.0:
            raise WeightingError(
                f"weight {weight:g} of expert {place} is below 0; weights are shares of a mean here: to subtract, "
                "negate() the adapter first"
            )
        if by_place:
            result.append(Share(by_place.get(place), float(weight), _require(seen, part, by_place, place)))
    return result if by_place else []


def share_bias(found: Sequence[Share]) -> Tensor | None:
    """Return the weighted mean of the biases, an absent one being zeros; None when no expert has one."""
    total_O = weighted_bias([share.term for share in found if share.term is not None])
    return None if total_O is None else total_O / sum(share.weight for share in found)


def _require(seen: LayerStatistics | None, part: str, found: dict[int, Term], place: int) -> LayerStatistics:
    first = next(iter(found.values())).factors
    num_out, num_in = sides = first.b_OR.shape[0], first.a_RI.shape[1]
    tensor = None if seen is None else getattr(seen, part)
    if seen is None or tensor is None:
        what = part.split("_")[0]
        raise WeightingError(
            f"the method needs {part} of expert {place}, whose statistics do not have it for this layer: collect them with "
            f"collect_statistics(model, tokenizer, adapter, texts, what=({what!r},))"
        )
    size = num_out if seen.turned else num_in
    wanted = (size, size) if part == "gram_II" else sides
    if tuple(tensor.shape) != wanted:
        raise WeightingError(f"{part} of expert {place} has shape {tuple(tensor.shape)}, but the layer {wanted}")
    if not all_finite(tensor):
        raise WeightingError(f"{part} of expert {place} has values that are NaN or infinite; collect it again")
    return seen
