"""TIES with counted signs, as TARA's code has it (arXiv 2603.26299): each expert has one vote, however small its entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loraweave.composer.merge.methods._signs import divisor_of, merge_elected
from loraweave.composer.merge.methods._thresholds import prune_smallest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.registry import traits
from loraweave.types import Factors


@traits("lossy")
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
    prune, divide = prune_smallest(density, method="ties_count"), divisor_of(aggregate, method="ties_count")
    return merge_elected(experts, weights, prune, method="ties_count", majority="frequency", divide=divide, scale=scale)
