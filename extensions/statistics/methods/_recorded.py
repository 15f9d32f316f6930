"""The experts of a mean that is weighted by data: their shares, updates and statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loraweave import WeightingError
from loraweave.extend import algebra
from loraweave.extend.merging import Experts, Term, Weights, terms, weighted_bias
from loraweave.extensions.statistics.saved import LayerStatistics


@dataclass(frozen=True, eq=False)
class Share:
    """An expert with a weight above 0 and its statistics, `seen`; `term` is None if its update is zero in this layer."""

    term: Term | None
    weight: float
    seen: LayerStatistics


def shares(experts: Experts, weights: Weights, statistics: Sequence[LayerStatistics | None], *, part: str) -> list[Share]:
    """Return the experts that take part in a layer's mean, in order, with their statistics; [] if none updates the layer.

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
    if not algebra.all_finite(tensor):
        raise WeightingError(f"{part} of expert {place} has values that are NaN or infinite; collect it again")
    return seen
