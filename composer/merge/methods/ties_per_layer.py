"""PEFT's TIES: trimmed layer by layer, signs elected without the weights (Yadav et al. 2023, as in peft 0.21)."""

from __future__ import annotations

from typing import Literal

from loraweave.common.options import Fraction
from loraweave.composer.merge.method_call import DenseUpdate, Experts, Weights
from loraweave.composer.merge.methods._entries import merge_elected
from loraweave.composer.merge.methods._pruning import prune_smallest
from loraweave.registry import traits


@traits("lossy")
def ties_per_layer(
    experts: Experts,
    weights: Weights,
    *,
    density: Fraction = 0.2,
    majority: Literal["total", "frequency"] = "total",
    scale: float = 1.0,
) -> DenseUpdate:
    """Return one layer's TIES merge as PEFT's `ties_svd` computes it before its SVD (`ties` there mixes factors).

    tau_e is an expert's update with exactly its int(density * entries) largest magnitudes kept, of equal ones the earlier.
    gamma = sign of the sum of tau_e, or of their signs (`majority`="frequency"); 1 where that is zero. The result is scale *
    (sum of w_e tau_e over experts with sign gamma) / (their number): weights take no part in the vote, nor in the divisor.
    fp32 products, votes in float64. `ties` trims over the whole model.
    """
    prune = prune_smallest(density)
    return merge_elected(experts, weights, prune, weighted=False, majority=majority, scale=scale)
