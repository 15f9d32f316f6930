"""PEFT's TIES: trimmed layer by layer, signs elected without the weights (Yadav et al. 2023, as in peft 0.21)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loraweave.composer.merge.methods._signs import merge_elected
from loraweave.composer.merge.methods._thresholds import prune_smallest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.registry import traits
from loraweave.types import Factors


@traits("lossy")
def ties_per_layer(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    majority: Literal["total", "frequency"] = "total",
    scale: float = 1.0,
) -> DenseUpdate | None:
    """One layer's TIES merge as PEFT's `ties_svd` computes it before its SVD (`ties` there mixes factors).

    Of each expert, exactly the int(density * entries) largest magnitudes are kept, of equal ones the earlier. gamma = sign
    of the sum of tau_e, or of their signs (`majority`="frequency"); 1 where that is zero. The result is scale * (sum of
    w_e tau_e over experts with sign gamma) / (their number): weights take no part in the vote, nor in the divisor.

    `density` in [0, 1] is the fraction kept. fp32 products, votes in float64. `ties` trims over the whole model instead.
    Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for updates that do not fit.
    """
    prune, method = prune_smallest(density, method="ties_per_layer"), "ties_per_layer"
    return merge_elected(experts, weights, prune, method=method, weighted=False, majority=majority, scale=scale)
