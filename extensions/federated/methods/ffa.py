"""Aggregation of clients that trained b alone, over one frozen a (FFA-LoRA)."""

from dataclasses import replace

import torch

from loraweave import Factors, LayerMismatch
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Weights, shares, terms, weighted_bias


@traits("shares", "by_factors", "one_a")
def ffa(experts: Experts, weights: Weights) -> Factors:
    """Return one layer's mean of b over the common a: exactly the mean update, at the clients' rank.

    b = sum of w_e b_e over sum of w_e (Sun et al. 2024, arXiv 2403.12313). Weights are the clients' sizes: positive, and
    only their proportions count. An expert without the layer has b = 0 there. Biases take the mean.

    Raises LayerMismatch unless every a is the same, bit for bit, WeightingError for a negative weight, and
    AdapterUnsupported for gains and unbound updates.
    """
    terms_E = terms(experts, shares(weights))
    first = terms_E[0].factors
    for term in terms_E[1:]:
        if not torch.equal(term.factors.a_RI, first.a_RI):
            raise LayerMismatch(
                "ffa averages b over one frozen a, but the experts' a differ (shapes "
                f"{tuple(first.a_RI.shape)} and {tuple(term.factors.a_RI.shape)}): use average, which is exact for any "
                "factors, or flexlora, which cuts that to a rank"
            )
    b_OR = torch.stack([term.factors.b_OR.double() * term.weight for term in terms_E]).sum(dim=0)
    return replace(first, a_RI=first.a_RI.clone(), b_OR=b_OR.float(), bias_O=weighted_bias(terms_E))
