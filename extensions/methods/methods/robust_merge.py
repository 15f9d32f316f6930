"""Pruned factors whose weak directions are amplified: RobustMerge (Zeng et al., NeurIPS 2025, arXiv 2502.17159)."""

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import Share, traits
from loraweave.extend.merging import Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import Spectrum, as_factors, core_factors, opened


@traits("lossy")
def robust_merge(experts: Experts, weights: Weights, *, density: Share = 0.2, scale: float = 1.0) -> Factors:
    """Return one layer's scale * sum of w_e B'_e diag(c_e) A'_e: pruned factors, with coefficients shared among experts.

    A'_e and B'_e keep the largest `density` of the entries of A_e and of B_e, each as a whole: int(density * entries), at
    least one, and those equal to the last. What pruning took from rank row i gives its coefficient, s_ei = |row i of A_e|_1
    / |row i of A'_e|_1, large for weak rows, which lose most; c_ei = s_ei / sum over the experts of s_fi, so that for each i
    the coefficients sum to 1 (pruning, complementary scaling, cross-task normalisation; `scale` is lambda, 2 in the authors'
    code for eight experts). Weights of 1 hence give an average. A row that is pruned away takes no part.

    Our reading, from the authors' and a third party's code rather than the paper's text: they prune A and B as trained,
    which depends on how an update is split. Here A_e = sqrt(S) V^T and B_e = U sqrt(S) of the update's SVD, so that row i
    is the i-th singular direction of every expert, and the weak rows are the small singular values that the paper is
    about. Updates are summed, as in the third party's version of Algorithm 1 (TARA-Merge); the authors' code adds up A'_e
    and B'_e of different experts apart, with cross terms, and raises small coefficients to their 80 % quantile. Biases are
    summed with weights. The result has at most the sum of ranks.
    """
    first, bias_O, parts = opened(experts, weights, scale)
    if not parts:
        return empty_update(first, bias_O)
    pruned = [_prune(spectrum, density) for spectrum in parts]
    total_R = torch.zeros(max(spectrum.rank for spectrum in parts), dtype=torch.float64)
    for _, _, s_R in pruned:
        total_R[: len(s_R)] += s_R
    share_of = [s_R / total_R[: len(s_R)].masked_fill(total_R[: len(s_R)] == 0, 1.0) for _, _, s_R in pruned]
    b_OS = torch.cat(
        [
            b_OR * (share_R * spectrum.weight * scale)
            for (b_OR, _, _), share_R, spectrum in zip(pruned, share_of, parts, strict=True)
        ],
        dim=1,
    )
    a_SI = torch.cat([a_RI for _, a_RI, _ in pruned])
    alive_S = b_OS.any(dim=0) & a_SI.any(dim=1)
    return as_factors(first, b_OS[:, alive_S], a_SI[alive_S], bias_O)


def _prune(parts: Spectrum, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return one expert's pruned B' (O, R) and A' (R, I), and s (R), which is 0 for a rank whose row of A is pruned away."""
    balanced = core_factors(parts)
    b_OR, a_RI = _largest(balanced.b_OR, density).double(), _largest(balanced.a_RI, density).double()
    whole_R, left_R = balanced.a_RI.double().abs().sum(dim=1), a_RI.abs().sum(dim=1)
    return b_OR, a_RI, torch.where(left_R > 0, whole_R / left_R.masked_fill(left_R == 0, 1.0), 0.0)


def _largest(x: Tensor, density: float) -> Tensor:
    """Return the tensor with zeros for all but the largest `density` of its entries by magnitude."""
    magnitude = x.abs()
    size = x.numel()
    count = max(1, int(density * size))
    bound = magnitude.flatten().kthvalue(size - count + 1).values
    return x.masked_fill(magnitude < bound, 0.0)
