"""PEFT's `ties`: the rule of TIES on a and on b separately."""

from __future__ import annotations

from typing import Literal

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights, terms_of_one_rank
from loraweave.extensions.methods.methods._factor_space import disjoint_mean, largest, merge_rooted


@traits("lossy", "by_factors")
def factor_ties(
    experts: Experts, weights: Weights, *, density: Fraction = 0.2, majority: Literal["total", "frequency"] = "total"
) -> Factors:
    """Return one layer's a and b, each by trimming, election of signs and disjoint mean over the experts' a or their b.

    PEFT's combination type "ties". Of each tensor the int(density * size) largest magnitudes stay; the sign of an entry is
    that of the sum of values ("total") or of signs ("frequency"), without weights; entries of that sign are summed with
    sqrt|w_e| (sign of w_e on a) and divided by their number. Biases likewise, with w_e.

    Not TIES of Yadav et al. 2023, which works on updates (`ties`; `ties_per_layer` trims as here): it depends on how updates
    are split into factors. With the LoRA scale part of b, it is PEFT's result where all scales are equal. An expert without
    the layer does not vote. Raises LayerMismatch for different ranks.
    """
    combine = disjoint_mean(majority)
    return merge_rooted(terms_of_one_rank(experts, weights, twin="ties_per_layer"), combine, largest(density))
