"""Spherical interpolation between two updates."""

from loraweave import Factors
from loraweave.extend import Share, traits
from loraweave.extend.merging import Experts, Weights, combination, gram, terms
from loraweave.extensions.methods.methods.nuslerp import interpolation, pair_shares


@traits("pairs", "shares")
def slerp(experts: Experts, weights: Weights, *, collinear: Share = 0.9995) -> Factors:
    """Return one layer's sin((1-t) A)/sin A * D_1 + sin(t A)/sin A * D_2, A being the angle between the two updates.

    Shoemake 1985, with each update as one long vector and t = w_2 / (w_1 + w_2). Two experts of other weights than zero, or
    one, which comes back as it is. The coefficients go onto the updates themselves, not onto unit vectors, as in mergekit.
    Where |cos A| is above `collinear`, and where an update is zero or its layer absent, it is (1-t) D_1 + t D_2.

    A is that between updates, from the factors alone, not between whole fine-tuned weights. The result is exact and of rank
    R_1 + R_2; biases take the coefficients of the updates. Raises WeightingError for three experts or more.
    """
    terms_E = terms(experts, pair_shares(weights))
    updates = [term.factors for term in terms_E]
    coefficients = [term.weight for term in terms_E]
    if len(updates) == 2:
        coefficients = [float(c) for c in interpolation(gram(updates), coefficients, max_cosine=collinear)]
    return combination(updates, coefficients)
