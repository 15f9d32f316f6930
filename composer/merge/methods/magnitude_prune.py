"""Magnitude pruning before the sum, PEFT's `magnitude_prune` on updates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, merged, weighted_sum
from loraweave.composer.merge.methods._options import finite
from loraweave.composer.merge.methods._terms import fraction, terms
from loraweave.composer.merge.methods._thresholds import count_of, keep_largest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.types import Factors


def magnitude_prune(
    experts: Sequence[Factors | None], weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0
) -> DenseUpdate | None:
    """One layer's scale * sum of w_e tau_e, tau_e being the largest entries of each update (peft 0.21, `magnitude_prune`).

    Exactly the int(density * entries) largest magnitudes of a layer are kept, of equal ones the earlier; `density` in
    [0, 1]. fp32 products. PEFT's type of that name prunes the factors instead; its `magnitude_prune_svd` is this, cut to a
    rank. Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for updates that do not fit.
    """
    fraction(density, "density", method="magnitude_prune", zero=True)
    finite(scale, "scale", method="magnitude_prune")

    def rule(entries: Entries, out_OI: Tensor) -> None:
        weighted_sum(entries, keep_largest(entries, count_of(density, entries.size), out_OI), out_OI, factor=scale)

    return merged(terms(experts, weights, method="magnitude_prune"), rule)
