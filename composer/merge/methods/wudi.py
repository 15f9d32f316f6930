"""The sum, moved towards what disturbs no expert: WUDI-Merging (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from loraweave.composer.merge.methods._core import as_factors, gram_svd, joint, opened
from loraweave.composer.merge.methods._span import nothing
from loraweave.composer.merge.methods._terms import Experts, Weights
from loraweave.types import Factors

# how far 300 steps of Adam at a rate of 1e-5 carry an entry whose gradient keeps its size
RELEASED_PATH = 300 * 1e-5


def wudi(experts: Experts, weights: Weights, *, minimiser: Literal["early", "exact"] = "early") -> Factors:
    """One layer's T on the way from the sum of D_e = w_e * update to the minimum of sum of |(T - D_e) D_e^T|^2 / |D_e|^2.

    With G = sum of D_e^T D_e / |D_e|^2 and C = sum of D_e D_e^T D_e / |D_e|^2 the loss falls along C - T G. Followed from
    T_0 = sum of D_e for a time t, this gives, for each eigenvector v of G and its eigenvalue l,

        T v = T_0 v + (1 - exp(-t l)) / l * (C - T_0 G) v

    which is "early", the default. Directions that matter to the experts move first; those in which experts of nearly equal
    A barely differ, and where the minimum lies far away, hardly move. The released code takes 300 steps of Adam at a rate
    of 1e-5, which divides each step by the root of the mean square of the gradients so far: it begins with steps whose root
    mean square is 1e-5. So does this one, with t = 300 * 1e-5 / rms(C - T_0 G), rms over the O * I entries. As in the
    released code the path is in units of weights: updates of large entries stay beside their sum, small ones come closer to
    the minimum, and no result is further from the sum than 0.003 sqrt(O I). Adam scales each entry by itself, which no
    closed form has: on adapters of SmolLM2 its result is 10 to 15 % of the sum's norm away from this one.

    "exact" is the minimum itself, of all minima the one nearest to the sum: T = C G^+, linear in the weights, whatever the
    size of the updates. Where the experts' A nearly coincide its norm is hundreds of times that of the sum. Eigenvalues
    below 2^-36 of the largest are rounding and do not count.

    A single expert and experts of orthogonal row spaces are at the minimum already and are summed. An update of zeros
    asks for nothing and is left out. Biases are summed with weights.
    """
    first, bias_O, parts = opened(experts, weights)
    if not parts:
        return nothing(first, bias_O)
    experts_S = joint(parts)
    norm_S = torch.cat([torch.full_like(each.s_R, each.norm) for each in parts])
    # G = z z^T; (z t) are its eigenvectors and s_P^2 its eigenvalues
    z_IS = experts_S.v_IS * (experts_S.s_S / norm_S)
    t_SP, s_P, vh_PS = gram_svd(z_IS)
    v_IP = z_IS @ t_SP
    target_OP = (experts_S.u_OS * (experts_S.size_S * experts_S.s_S / norm_S)) @ (vh_PS.T * s_P)
    if minimiser == "exact":
        return as_factors(first, target_OP / s_P.square(), v_IP.T, bias_O)
    sum_OP = (experts_S.u_OS * experts_S.size_S) @ (experts_S.v_IS.T @ v_IP)
    fall_OP = target_OP - sum_OP * s_P.square()
    num_entries = first.b_OR.shape[0] * first.a_RI.shape[1]
    return as_factors(first, sum_OP + fall_OP * _reach(fall_OP, s_P.square(), num_entries), v_IP.T, bias_O)


def _reach(fall_OP: Tensor, eigenvalue_P: Tensor, num_entries: int) -> Tensor:
    """(1 - exp(-t l)) / l of every eigenvalue l."""
    rms = float(fall_OP.norm()) / math.sqrt(num_entries)
    if rms == 0.0:
        return torch.zeros_like(eigenvalue_P)
    return -torch.expm1(-RELEASED_PATH / rms * eigenvalue_P) / eigenvalue_P
