"""Magnitude pruning before the sum, PEFT's `magnitude_prune` on updates."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.merge.methods._entries import sum_pruned
from loraweave.composer.merge.methods._thresholds import prune_smallest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.registry import traits
from loraweave.types import Factors


@traits("lossy")
def magnitude_prune(
    experts: Sequence[Factors | None], weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0
) -> DenseUpdate | None:
    """One layer's scale * sum of w_e tau_e, tau_e being the largest entries of each update (peft 0.21, `magnitude_prune`).

    Exactly the int(density * entries) largest magnitudes of a layer are kept, of equal ones the earlier; `density` in
    [0, 1]. fp32 products. PEFT's type of that name prunes the factors instead; its `magnitude_prune_svd` is this, cut to a
    rank. Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for updates that do not fit.
    """
    prune = prune_smallest(density, method="magnitude_prune")
    return sum_pruned(experts, weights, prune, method="magnitude_prune", scale=scale)
