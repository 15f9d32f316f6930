"""TIES with counted signs, as TARA's code has it (arXiv 2603.26299): each expert has one vote, however small its entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, merged
from loraweave.composer.merge.methods._options import choice, finite
from loraweave.composer.merge.methods._signs import merge_by_sign
from loraweave.composer.merge.methods._terms import fraction, terms
from loraweave.composer.merge.methods._thresholds import count_of, keep_largest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.types import Factors


def ties_count(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    aggregate: Literal["mean", "sum"] = "mean",
    scale: float = 1.0,
) -> DenseUpdate | None:
    """One layer's TIES merge with the sign that more experts have, 1 where as many have either.

    Of each expert, exactly the int(density * entries) largest magnitudes of the layer are kept, of equal ones the earlier.
    gamma = sign of the sum of sign(w_e tau_e). The result is scale * the mean or sum (`aggregate`) of w_e tau_e over the
    experts with that sign. Weights of one are TARA's.

    `density` in [0, 1] is the fraction kept. fp32 products. `ties_per_layer` with majority="frequency" counts the signs of
    tau_e instead, so that it differs for negative weights.
    Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for updates that do not fit.
    """
    fraction(density, "density", method="ties_count", zero=True)
    choice(aggregate, "aggregate", ("mean", "sum"), method="ties_count")
    finite(scale, "scale", method="ties_count")

    def rule(entries: Entries, out_OI: Tensor) -> None:
        keep = keep_largest(entries, count_of(density, entries.size), out_OI)
        divide: Literal["count", "nothing"] = "count" if aggregate == "mean" else "nothing"
        merge_by_sign(entries, keep, out_OI, weighted=True, majority="frequency", divide=divide, scale=scale)

    return merged(terms(experts, weights, method="ties_count"), rule)
