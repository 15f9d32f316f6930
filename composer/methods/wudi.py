"""The update that disturbs no expert, in closed form: WUDI-Merging (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraweave.composer.methods._core import as_factors, gram_svd, joint, nothing, scaled_bias, spectra
from loraweave.composer.methods._terms import terms
from loraweave.types import Factors


def wudi(experts: Sequence[Factors | None], weights: Sequence[float]) -> Factors | None:
    """One layer's T that minimises the sum of |(T - D_e) D_e^T|^2 / |D_e|^2, D_e being w_e times the update.

    The loss is quadratic and its minimiser is unique up to what acts on no expert's inputs; of all minimisers this is the
    one nearest to the weighted sum, which is also the smallest. With D_e = U_e S_e V_e^T it is the least-squares solution
    of T V_e S_e / |S_e| = w_e U_e S_e^2 / |S_e| for all experts at once: T = Y Z^+. In the loss a weight only scales its
    target, so T is linear in the weights: T = sum of w_e D_e G_e (sum of G_f)^+ with G_e = D_e^T D_e / |D_e|^2, RegMean
    (Jin et al. 2023) with the update's own Gram matrix in the place of the inputs'. A single expert comes back as it is;
    experts of orthogonal row spaces are summed, equal ones averaged.

    The released code takes 300 steps of Adam (rate 1e-5) from the plain sum and stops before the minimum; mttl's variant
    divides by the number of experts. Directions below 2^-18 of the largest singular value of Z do not count, so rounding is
    not fitted. An update of zeros asks for nothing and is left out. Biases are summed with weights. Raises LayerMismatch
    and AdapterUnsupported for updates that do not fit.
    """
    found = terms(experts, weights, method="wudi")
    if not found:
        return None
    first, bias_O = found[0].factors, scaled_bias(found, 1.0)
    parts = [each for each in spectra(found) if each.rank]
    if not parts:
        return nothing(first, bias_O)
    experts_S = joint(parts)
    norm_S = torch.cat([torch.full_like(each.s_R, each.norm) for each in parts])
    z_IS = experts_S.v_IS * (experts_S.s_S / norm_S)
    t_SP, s_P, vh_PS = gram_svd(z_IS)
    b_OP = (experts_S.u_OS * (experts_S.size_S * experts_S.s_S / norm_S)) @ (vh_PS.T / s_P)
    return as_factors(first, b_OP, (z_IS @ t_SP).T, bias_O)
