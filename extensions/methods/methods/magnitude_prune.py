"""Magnitude pruning before the sum, PEFT's `magnitude_prune` on updates."""

from loraweave.extend import Fraction, traits
from loraweave.extend.merging import DenseUpdate, Experts, Weights, prune_smallest, sum_pruned


@traits("lossy")
def magnitude_prune(experts: Experts, weights: Weights, *, density: Fraction = 0.5, scale: float = 1.0) -> DenseUpdate:
    """Return one layer's scale * sum of w_e tau_e, tau_e being an update's largest entries (peft 0.21, `magnitude_prune`).

    Exactly the int(density * entries) largest magnitudes of a layer are kept, of equal ones the earlier. fp32 products.
    PEFT's type of that name prunes the factors instead; its `magnitude_prune_svd` is this, cut to a rank.
    """
    prune = prune_smallest(density)
    return sum_pruned(experts, weights, prune, scale=scale)
