"""The sum, moved towards what disturbs no expert: WUDI-Merging (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend.merging import DenseUpdate, Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import Joint, as_factors, gram_svd, joint, opened

# the settings of Adam in the released code; the others are torch's defaults
STEPS, RATE = 300, 1e-5
# the rounding of float64 sums of some thousand terms, beside their size
ROUNDING = 2.0**-40


def wudi(
    experts: Experts, weights: Weights, *, minimiser: Literal["early", "released", "exact"] = "early"
) -> Factors | DenseUpdate:
    """Return one layer's T between the sum of D_e = w_e * update and the minimum of sum of |(T - D_e) D_e^T|^2 / |D_e|^2.

    With G = sum of D_e^T D_e / |D_e|^2 and C = sum of D_e D_e^T D_e / |D_e|^2 the loss falls along C - T G. Followed from
    T_0 = sum of D_e for a time t, this gives, for each eigenvector v of G and its eigenvalue l,

        T v = T_0 v + (1 - exp(-t l)) / l * (C - T_0 G) v

    which is "early", the default. Directions that matter to the experts move first; those in which experts of nearly equal
    A barely differ, and where the minimum lies far away, hardly move. The released code takes 300 steps of Adam at a rate
    of 1e-5, which divides each step by the root of the mean square of the gradients so far: it begins with steps whose root
    mean square is 1e-5. So does this one, with t = 300 * 1e-5 / rms(C - T_0 G), rms over the O * I entries. As in the
    released code the path is in units of weights: updates of large entries stay beside their sum, small ones come closer to
    the minimum, and no result is further from the sum than 0.003 sqrt(O I). Adam scales each entry by itself, which no
    closed form has: in layers of adapters of SmolLM2 it moves 9 to 28 % of the sum's norm, to 7 to 17 % away from this.

    "released" takes those 300 steps, as Adam does (betas 0.9 and 0.999, epsilon 1e-8), in float64. It gives a dense update
    of full rank, and takes seconds a layer. Rows at the minimum stay, where the released code moves them by rounding.

    "exact" is the minimum itself, of all minima the one nearest to the sum: T = C G^+, linear in the weights, whatever the
    size of the updates. Where the experts' A nearly coincide its norm is hundreds of times that of the sum. Eigenvalues
    below 2^-36 of the largest are rounding and do not count.

    A single expert and experts of orthogonal row spaces are at the minimum already and are summed. An update of zeros
    asks for nothing and is left out. Biases are summed with weights.
    """
    first, bias_O, parts = opened(experts, weights)
    if not parts:
        return empty_update(first, bias_O)
    experts_S = joint(parts)
    norm_S = torch.cat([torch.full_like(spectrum.s_R, spectrum.norm) for spectrum in parts])
    # G = z z^T; (z t) are its eigenvectors and s_P^2 its eigenvalues
    z_IS = experts_S.v_IS * (experts_S.s_S / norm_S)
    # C = wanted z^T
    wanted_OS = experts_S.u_OS * (experts_S.size_S * experts_S.s_S / norm_S)
    if minimiser == "released":
        return DenseUpdate(_released(experts_S, z_IS, wanted_OS).float(), bias_O, first.kind, first.kernel)
    t_SP, s_P, vh_PS = gram_svd(z_IS)
    v_IP = z_IS @ t_SP
    target_OP = wanted_OS @ (vh_PS.T * s_P)
    if minimiser == "exact":
        return as_factors(first, target_OP / s_P.square(), v_IP.T, bias_O)
    sum_OP = (experts_S.u_OS * experts_S.size_S) @ (experts_S.v_IS.T @ v_IP)
    fall_OP = target_OP - sum_OP * s_P.square()
    rms = float(fall_OP.norm()) / math.sqrt(first.b_OR.shape[0] * first.a_RI.shape[1])
    if rms:
        # (1 - exp(-t l)) / l of every eigenvalue l
        fall_OP = fall_OP * (-torch.expm1(-STEPS * RATE / rms * s_P.square()) / s_P.square())
    return as_factors(first, sum_OP + fall_OP, v_IP.T, bias_O)


def _released(experts_S: Joint, z_IS: Tensor, wanted_OS: Tensor) -> Tensor:
    """Return T_OI in float64 after the released code's Adam steps from the sum, with the gradient 2 (T z - wanted) z^T."""
    sum_OI = (experts_S.u_OS * experts_S.size_S) @ experts_S.v_IS.T
    met_OS = sum_OI @ z_IS
    # each row has a gradient of its own; at the minimum it is rounding, of which Adam would make steps
    moves_O = (met_OS - wanted_OS).norm(dim=1) > ROUNDING * (met_OS.norm(dim=1) + wanted_OS.norm(dim=1))
    update_NI, wanted_NS = sum_OI[moves_O], wanted_OS[moves_O]
    adam = torch.optim.Adam([update_NI], lr=RATE)
    for _ in range(STEPS):
        update_NI.grad = 2 * (update_NI @ z_IS - wanted_NS) @ z_IS.T
        adam.step()
    sum_OI[moves_O] = update_NI
    return sum_OI
