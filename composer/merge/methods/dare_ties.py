"""DARE (Yu et al. 2023, arXiv 2311.03099) before sign election and disjoint merge, as PEFT's `dare_ties` on updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loraweave.common.options import Fraction
from loraweave.composer.merge.method_call import DenseUpdate, Experts, Weights
from loraweave.composer.merge.methods._entries import merge_elected
from loraweave.composer.merge.methods._pruning import prune_random
from loraweave.registry import traits


@traits("lossy")
def dare_ties(
    experts: Experts,
    weights: Weights,
    *,
    seeds: Sequence[int],
    density: Fraction = 0.5,
    majority: Literal["total", "frequency"] = "total",
    scale: float = 1.0,
) -> DenseUpdate:
    """Return one layer's TIES merge of randomly dropped updates tau_e = m_e delta_e / q (m_e and q as in `dare_linear`).

    gamma = sign of the sum of tau_e, or of their signs (`majority`="frequency"); 1 where that is zero. The result is scale *
    (sum of w_e tau_e over experts with sign gamma) / (their number), as in `ties_per_layer`. fp32 products, votes in
    float64. PEFT's `dare_ties` drops entries of the factors; its `dare_ties_svd` is this, cut to a rank and with other
    random numbers; mergekit's votes with the weights and rescales to the L1 norm.
    """
    prune, kept = prune_random(seeds, density)
    # all experts are rescaled alike, so the vote need not be
    scale *= 1.0 / kept
    return merge_elected(experts, weights, prune, weighted=False, majority=majority, scale=scale)
