"""DARE (Yu et al. 2023, arXiv 2311.03099) before sign election and disjoint merge, as PEFT's `dare_ties` on updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from loraweave.composer.merge.methods._dropout import keep_random
from loraweave.composer.merge.methods._entries import Entries, merged
from loraweave.composer.merge.methods._options import choice, finite
from loraweave.composer.merge.methods._signs import merge_by_sign
from loraweave.composer.merge.methods._terms import fraction, terms
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.types import Factors


def dare_ties(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    majority: Literal["total", "frequency"] = "total",
    scale: float = 1.0,
) -> DenseUpdate | None:
    """One layer's TIES merge of randomly dropped updates tau_e = m_e delta_e / q (m_e and q as in `dare_linear`).

    gamma = sign of the sum of tau_e, or of their signs (`majority`="frequency"); 1 where that is zero. The result is
    scale * (sum of w_e tau_e over experts with sign gamma) / (their number), as in `ties_per_layer`.

    `density` in [0, 1] is the probability of keeping an entry, rounded to a multiple of 2^-16; 0 gives zeros. fp32 products,
    votes in float64. PEFT's `dare_ties` drops entries of the factors; its `dare_ties_svd` is this, cut to a rank and with
    other random numbers; mergekit's votes with the weights and rescales to the L1 norm.
    Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for updates that do not fit.
    """
    fraction(density, "density", method="dare_ties", zero=True)
    choice(majority, "majority", ("total", "frequency"), method="dare_ties")
    finite(scale, "scale", method="dare_ties")

    def rule(entries: Entries, out_OI: Tensor) -> None:
        keep, probability = keep_random(entries, seeds, density)
        # all experts are rescaled alike, so the vote need not be
        factor = 1.0 / probability
        merge_by_sign(entries, keep, out_OI, weighted=False, majority=majority, divide="count", scale=scale, factor=factor)

    return merged(terms(experts, weights, method="dare_ties"), rule)
