"""DARE (Yu et al. 2023, arXiv 2311.03099) before the sum: entries dropped at random, the others rescaled."""

from collections.abc import Sequence

from loraweave.common.options import Fraction
from loraweave.composer.merge.method_call import DenseUpdate, Experts, Weights
from loraweave.composer.merge.methods._entries import sum_pruned
from loraweave.composer.merge.methods._pruning import prune_random
from loraweave.registry import traits


@traits("lossy")
def dare_linear(
    experts: Experts, weights: Weights, *, seeds: Sequence[int], density: Fraction = 0.5, scale: float = 1.0
) -> DenseUpdate:
    """Return one layer's scale * sum of w_e m_e delta_e / q, each entry of m_e being 1 with probability q, else 0.

    On average this is the weighted sum. `density` = 1 - p is the probability of keeping an entry, rounded to a multiple q of
    2^-16 (at least one; 0 gives zeros). Masks depend on seeds[e] and an entry's place alone. fp32 products.

    mergekit's rescales to the L1 norm of the update, and PEFT's `dare_linear` drops entries of the factors; PEFT's
    `dare_linear_svd` is this, cut to a rank and with other random numbers.
    """
    prune, kept = prune_random(seeds, density)
    return sum_pruned(experts, weights, prune, scale=scale / kept)
