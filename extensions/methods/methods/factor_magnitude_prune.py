"""PEFT's `magnitude_prune`: the largest entries of a and of b, summed separately."""

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights, terms_of_one_rank
from loraweave.extensions.methods.methods._factor_space import largest, merge_rooted, weighted_sum


@traits("lossy", "by_factors")
def factor_magnitude_prune(experts: Experts, weights: Weights, *, density: Fraction = 0.5) -> Factors:
    """Return one layer's a and b, each the sum over experts of their int(density * size) entries of largest magnitude.

    PEFT's combination type "magnitude_prune": sqrt|w_e| on both sides, the sign of w_e on a; `density` is the fraction kept,
    of a and of b apart. Biases likewise, with w_e. On updates this is `magnitude_prune`. With the LoRA scale part of b, it
    is PEFT's result where all scales are equal. An expert without the layer adds nothing. LayerMismatch for different ranks.
    """
    terms_E = terms_of_one_rank(experts, weights, twin="magnitude_prune")
    return merge_rooted(terms_E, weighted_sum, largest(density))
