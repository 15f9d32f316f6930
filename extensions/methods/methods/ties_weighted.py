"""mergekit's TIES: trimmed layer by layer, signs elected with the weights, divided by the weights that agree."""

from __future__ import annotations

from typing import Literal

from loraweave.extend import Fraction, traits
from loraweave.extend.merging import DenseUpdate, Experts, Weights, merge_elected, prune_smallest


@traits("lossy")
def ties_weighted(
    experts: Experts,
    weights: Weights,
    *,
    density: Fraction = 0.2,
    majority: Literal["total", "frequency"] = "total",
    normalize: bool = True,
    scale: float = 1.0,
) -> DenseUpdate:
    """Return one layer's TIES merge (Yadav et al. 2023, arXiv 2306.01708) as mergekit defines it for full weights.

    Of each expert, exactly the int(density * entries) largest magnitudes are kept, of equal ones the earlier. gamma = sign
    of the sum of w_e tau_e, or of their signs (`majority`="frequency"); 1 where that is zero. The result is scale * sum of
    w_e tau_e over the experts for which w_e tau_e has sign gamma, with `normalize` divided by the sum of their w_e (by 1
    where that is zero; weights of both signs can make it small). One expert is thus given back whatever its weight. fp32
    products, votes in float64. `ties_per_layer` votes without the weights.
    """
    prune, aggregate = prune_smallest(density), "weights" if normalize else "sum"
    return merge_elected(experts, weights, prune, majority=majority, aggregate=aggregate, scale=scale)
