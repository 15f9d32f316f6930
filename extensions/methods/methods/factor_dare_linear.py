"""PEFT's `dare_linear`: entries of a and b are dropped at random and the rest rescaled, then each factor is summed."""

from collections.abc import Sequence

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights, terms_of_one_rank
from loraweave.extensions.methods.methods._factor_space import merge_rooted, random_rescaled, weighted_sum


@traits("lossy", "by_factors")
def factor_dare_linear(experts: Experts, weights: Weights, *, seeds: Sequence[int], density: Fraction = 0.5) -> Factors:
    """Return one layer's a and b, each the sum over experts of a random part of the entries, divided by `density`.

    PEFT's combination type "dare_linear" (drop and rescale, Yu et al. 2024, arXiv 2311.03099, on a and b apart): each entry
    stays with probability `density`; sqrt|w_e| on both sides, the sign of w_e on a. Draws follow `seeds`, one for each
    expert, and so neither order nor device. In expectation it is `factor_linear`; on updates it is `dare_linear`. Biases
    likewise, with w_e. An expert without the layer adds nothing. Raises LayerMismatch for different ranks.
    """
    terms_E = terms_of_one_rank(experts, weights, twin="dare_linear")
    return merge_rooted(terms_E, weighted_sum, random_rescaled(density, seeds))
