"""The weighted mean of updates, exactly."""

from loraweave.composer.merge.method_call import Experts, Weights
from loraweave.composer.merge.methods._span import mean_weights
from loraweave.composer.merge.methods.linear import linear
from loraweave.registry import traits
from loraweave.types import Factors


@traits("shares")
def average(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's sum of w_e D_e over the sum of w_e, by concatenation, so exact and of rank sum of R_e.

    Only proportions of the weights count; equal ones give the mean of the fine-tuned models (model soups, Wortsman et al.
    2022, arXiv 2203.05482). An expert without the layer is a zero update whose weight stays in the denominator. Gains and
    biases enter as the update does; a single expert of any kind comes back as it is. Raises WeightingError for weights that
    sum to zero. `factor_average` averages a and b apart, which is not this.
    """
    return linear(experts, mean_weights(weights))
