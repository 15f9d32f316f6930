"""TIES with counted signs, as TARA's code has it (arXiv 2603.26299): each expert has one vote, however small its entry."""

from __future__ import annotations

from typing import Literal

from loraweave.extend import Fraction, traits
from loraweave.extend.merging import DenseUpdate, Experts, Weights, merge_elected, prune_smallest


@traits("lossy")
def ties_count(
    experts: Experts,
    weights: Weights,
    *,
    density: Fraction = 0.2,
    aggregate: Literal["mean", "sum"] = "mean",
    scale: float = 1.0,
) -> DenseUpdate:
    """Return one layer's TIES merge with the sign that more experts have, 1 where as many have either.

    Of each expert, exactly the int(density * entries) largest magnitudes of the layer are kept, of equal ones the earlier.
    gamma = sign of the sum of sign(w_e tau_e). The result is scale * the mean or sum (`aggregate`) of w_e tau_e over the
    experts with that sign. Weights of one are TARA's. fp32 products. `ties_per_layer` with majority="frequency" counts the
    signs of tau_e, and so differs for negative weights.
    """
    prune = prune_smallest(density)
    return merge_elected(experts, weights, prune, majority="frequency", aggregate=aggregate, scale=scale)
