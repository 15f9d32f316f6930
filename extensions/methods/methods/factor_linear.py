"""PEFT's `linear`: the factors a and b are summed separately, with the roots of the weights."""

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Weights, terms_of_one_rank
from loraweave.extensions.methods.methods._factor_space import merge_rooted, weighted_sum


@traits("by_factors")
def factor_linear(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's a = sum of sign(w_e) sqrt|w_e| a_e and b = sum of sqrt|w_e| b_e: PEFT's combination type "linear".

    The update is the sum over e, f of sqrt|w_e w_f| sign(w_f) b_e a_f: the weighted sum of updates plus cross terms. The
    LoRA scale s_e is part of b_e here, while PEFT puts its root on either side; both agree where all s_e are equal, and
    otherwise differ in the cross terms (this is PEFT's result for the same updates stored with lora_alpha = r). One expert
    of weight w gives w D. An expert without the layer adds nothing. Biases sum with w_e. LayerMismatch for different ranks.
    """
    return merge_rooted(terms_of_one_rank(experts, weights, twin="linear"), weighted_sum)
