"""The weighted sum of factors, LoraHub's original form (Huang et al. 2023, arXiv 2307.13269): cross terms included."""

from dataclasses import replace

import torch

from loraweave.composer.merge.method_call import Experts, Weights, terms_of_one_rank
from loraweave.registry import traits
from loraweave.types import Factors


@traits("by_factors")
def factor_sum(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's A = sum of w_e a_e and B = sum of w_e b_e, hence the update sum over i, j of w_i w_j b_i a_j.

    Not the weighted sum of updates: a single expert of weight w counts w^2, the sign of all weights cancels, and the result
    depends on how an update is split into a and b. The LoRA scale s is folded into b, so for experts of one scale this
    equals s * B_hat A_hat of the paper. An expert without the layer adds nothing. Biases sum with w. Raises LayerMismatch
    for different ranks.
    """
    weighted = [(term.factors, term.weight) for term in terms_of_one_rank(experts, weights, twin="linear")]
    biases = [factors.bias_O * weight for factors, weight in weighted if factors.bias_O is not None]
    return replace(
        weighted[0][0],
        a_RI=torch.stack([factors.a_RI * weight for factors, weight in weighted]).sum(dim=0),
        b_OR=torch.stack([factors.b_OR * weight for factors, weight in weighted]).sum(dim=0),
        bias_O=torch.stack(biases).sum(dim=0) if biases else None,
    )
