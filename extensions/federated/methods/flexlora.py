"""Aggregation of clients of different ranks: the mean update, decomposed again (FlexLoRA)."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraweave import Factors
from loraweave.extend import Experts, TruncatedUpdate, Weights, algebra, get, shares, traits


@traits("shares")
def flexlora(experts: Experts, weights: Weights, *, rank: int | None = None) -> TruncatedUpdate:
    """Return one layer's mean update cut to `rank`, with b = U Sigma and a = V^T (Bai et al. 2024, arXiv 2402.11505).

    Weights are the clients' sizes: only their proportions count. Without `rank` it is the largest among the experts that
    count. Rows of a are orthonormal and ordered by singular value, so that the first r of them are the best approximation of
    rank r: `flexlora_clients` gives each client its own from one decomposition. From the factors alone, in float64. An
    expert without the layer is a zero update. Gains and biases take the mean.
    """
    truncated: TruncatedUpdate = get("methods", "svd")(experts, shares(weights), rank=rank)
    # one client of an update that needs the base layer keeps the factors of the cut
    return replace(truncated, factors=_right_orthonormal(truncated.factors)) if truncated.factors.bound else truncated


def _right_orthonormal(factors: Factors) -> Factors:
    """Return the same update with the rows of a orthonormal and b = U Sigma, largest first."""
    q_OR, core_RR, p_IR = algebra.orthonormal(factors.a_RI, factors.b_OR)
    u_RR, sigma_R, vh_RR = torch.linalg.svd(core_RR, full_matrices=False)
    return replace(factors, a_RI=(vh_RR @ p_IR.T).float(), b_OR=(q_OR @ (u_RR * sigma_R)).float())
