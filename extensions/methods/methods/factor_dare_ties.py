"""PEFT's `dare_ties`: entries of a and b are dropped at random and the rest rescaled, then each factor is merged by TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights, terms_of_one_rank
from loraweave.extensions.methods.methods._factor_space import disjoint_mean, merge_rooted, random_rescaled


@traits("lossy", "by_factors")
def factor_dare_ties(
    experts: Experts,
    weights: Weights,
    *,
    seeds: Sequence[int],
    density: Fraction = 0.5,
    majority: Literal["total", "frequency"] = "total",
) -> Factors:
    """Return one layer's a and b, each by election of signs and disjoint mean over a random part of the experts' entries.

    PEFT's combination type "dare_ties": each entry stays with probability `density`, divided by that (Yu et al. 2024, arXiv
    2311.03099); then signs and mean as in `factor_ties`. Draws follow `seeds`, one for each expert, and so neither order nor
    device. Biases likewise, with w_e. On updates this is `dare_ties`. An expert without the layer does not vote. Raises
    LayerMismatch for different ranks.
    """
    combine = disjoint_mean(majority)
    terms_E = terms_of_one_rank(experts, weights, twin="dare_ties")
    return merge_rooted(terms_E, combine, random_rescaled(density, seeds))
