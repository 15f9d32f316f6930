"""The weighted means of the factors a and b, taken separately."""

from dataclasses import replace

import torch

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Weights, mean_weights, terms_of_one_rank, weighted_bias


@traits("shares", "by_factors")
def factor_average(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's a = sum of p_e a_e and b = sum of p_e b_e with p_e = w_e over the sum of the weights.

    The addition of PEM arithmetic (Zhang et al. 2023, arXiv 2306.14870), adapter soups (Chronopoulou et al. 2023, arXiv
    2302.07027), FedAvg on LoRA; for a slow and a fast adapter of weights decay and 1 - decay a step of I-LoRA's moving
    average (Ren et al. 2024, arXiv 2402.18865). Not a mean of updates (`average`): a_e and b_f of different experts
    multiply. An expert without the layer has zeros, and its weight stays in the sum. Biases take the mean. Raises
    WeightingError for weights that sum to zero, LayerMismatch for different ranks.
    """
    parts = mean_weights(weights)
    terms_E = terms_of_one_rank(experts, parts, twin="average")
    a_RI = torch.stack([term.factors.a_RI.double() * term.weight for term in terms_E]).sum(dim=0)
    b_OR = torch.stack([term.factors.b_OR.double() * term.weight for term in terms_E]).sum(dim=0)
    return replace(terms_E[0].factors, a_RI=a_RI.float(), b_OR=b_OR.float(), bias_O=weighted_bias(terms_E))
