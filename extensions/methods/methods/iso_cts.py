"""A common and task-specific subspaces of equal strength: Iso-CTS (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import Joint, Spectrum, assemble, counted, gram_svd, joint, opened


@traits("lossy")
def iso_cts(experts: Experts, weights: Weights, *, common_space_fraction: Fraction = 0.8, scale: float = 1.0) -> Factors:
    """Return one layer's scale * mean(sigma) U* V*^T over the sum's top directions and what each expert has beyond them.

    Of the d dimensions that the experts span together (the smaller of their joint column and row space), E * n are given
    to the E experts, n = round((d - int(d * fraction)) / E) each, and the rest to the sum of w_e D_e: its top singular
    vectors U_c. The n top singular triplets of (1 - U_c U_c^T) w_e D_e of each expert are set beside those of the sum, both
    sides are made orthonormal by their polar factors, and all singular values become their mean.

    All stays within the experts' joint support: d replaces min(O, I), triplets that are zero (2^-18 beside the experts' own)
    are neither kept nor averaged, and polar factors are null where their stack is. The released code counts min(O, I)
    dimensions and for LoRAs fills most of them with directions that no expert has. An update of zeros counts as not given.
    Biases are summed with weights.
    """
    first, bias_O, parts = opened(experts, weights, scale)
    if not parts or not scale:
        return empty_update(first, bias_O)
    experts_S = joint(parts)
    largest = float(experts_S.size_S.abs().max())
    # orthonormal coordinates on both sides: u = (u l) u_PS and v = (v r) v_QS
    left_SP, s_P, u_PS = gram_svd(experts_S.u_OS)
    right_SQ, s_Q, v_QS = gram_svd(experts_S.v_IS)
    u_PS, v_QS = s_P[:, None] * u_PS, s_Q[:, None] * v_QS
    dimension = min(len(s_P), len(s_Q))
    num_beyond = round((dimension - int(dimension * common_space_fraction)) / len(parts))
    u_PK, sigma_K, vh_KQ = torch.linalg.svd((u_PS * experts_S.size_S) @ v_QS.T, full_matrices=False)
    common = min(max(dimension - num_beyond * len(parts), 0), counted(sigma_K, beside=largest))
    beyond = _beyond(parts, experts_S, u_PS, v_QS, u_PK[:, :common], num_beyond)
    left_PM = torch.cat([u_PK[:, :common], *(u_PR for u_PR, _, _ in beyond)], dim=1)
    right_QM = torch.cat([vh_KQ[:common].T, *(v_QR for _, _, v_QR in beyond)], dim=1)
    sigma_M = torch.cat([sigma_K[:common], *(sigma_R for _, sigma_R, _ in beyond)])
    if not len(sigma_M):
        return empty_update(first, bias_O)
    polar_PQ = _polar(left_PM) @ _polar(right_QM).T * (float(sigma_M.mean()) * scale)
    return assemble(first, experts_S, polar_PQ, (left_SP, right_SQ), bias_O, num=len(sigma_M), scale=scale)


def _beyond(
    parts: Sequence[Spectrum], experts_S: Joint, u_PS: Tensor, v_QS: Tensor, common_PC: Tensor, num: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the `num` top singular triplets of each w D outside the common column space; fewer if others are zero."""
    rest_PS = u_PS * experts_S.size_S
    rest_PS = rest_PS - common_PC @ (common_PC.T @ rest_PS)
    triplets = []
    for spectrum, rest_PR, v_QR in zip(parts, experts_S.each(rest_PS), experts_S.each(v_QS), strict=True):
        u_PR, sigma_R, vh_RR = torch.linalg.svd(rest_PR, full_matrices=False)
        keep = min(num, counted(sigma_R, beside=abs(spectrum.weight) * float(spectrum.s_R[0])))
        triplets.append((u_PR[:, :keep], sigma_R[:keep], v_QR @ vh_RR[:keep].T))
    return triplets


def _polar(stack_NM: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, null where the stack is."""
    t_MP, _, vh_PM = gram_svd(stack_NM)
    return stack_NM @ t_MP @ vh_PM
