"""Ridge regressions from mean products, drawn towards the identity, with the ridge chosen on held-out rows.

    N = argmin over N of E|t - N s|^2 + w |N - P|^2,   w = ridge * the mean square of a feature of s

P is the identity where t and s have as many features, else zero. Products are (2, rows, columns): of two halves of the rows.
"""

import math

import torch
from torch import Tensor

RIDGES: tuple[float, ...] = tuple(10.0 ** (power / 2) for power in range(-16, 3))
# a larger ridge is taken if its noise over signal is at most this many times the least
TOLERANCE = 1.1
# the smallest error, which rounding leaves, as a share of the size of t
ROUNDING = 1e-12


def drawn(gram_SS: Tensor, cross_TS: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return (G, C) such that C G^-1 is the regression N with this ridge, given E s s^T and E t s^T."""
    drawn_SS = ridge * gram_SS.diagonal().mean() * torch.eye(len(gram_SS)).to(gram_SS)
    return gram_SS + drawn_SS, cross_TS + drawn_SS if cross_TS.shape == gram_SS.shape else cross_TS


def choose_ridge(gram_2SS: Tensor, cross_2TS: Tensor, target_2TT: Tensor, fit: int) -> float:
    """Return the largest of RIDGES that is about as good on the other half of the rows, for N fitted on the half `fit`.

    An error is e = E|t - N s|^2 / E|t|^2 on the other half, and e / (1 - e) is noise over signal. A ridge is about as good
    if that is at most TOLERANCE times the least, as in the rule of one standard error (Breiman et al. 1984, 3.4.3): where
    the rows do not decide, the larger ridge keeps N near P, the identity or zero.
    """
    errors = _errors(gram_2SS, cross_2TS, target_2TT, fit)
    odds = [error / (1 - error) if error < 1 else math.inf for error in errors]
    return max(ridge for ridge, odd in zip(RIDGES, odds, strict=True) if odd <= TOLERANCE * min(odds))


def _errors(gram_2SS: Tensor, cross_2TS: Tensor, target_2TT: Tensor, fit: int) -> list[float]:
    """Return the held-out error of each ridge in RIDGES, at least ROUNDING, all from one eigendecomposition.

    With G = V diag(g) V^T the Gram matrix and C the cross products of the half `fit`, N = (C + w P) V diag(1 / (g + w)) V^T:
    the products with the other half are made once, and each ridge only needs sums over their entries.
    """
    judge = 1 - fit
    gram_SS, cross_TS = gram_2SS[fit], cross_2TS[fit]
    value_S, v_SS = torch.linalg.eigh(gram_SS)
    c_TS, judged_TS = cross_TS @ v_SS, cross_2TS[judge] @ v_SS
    p_TS = v_SS if cross_TS.shape == gram_SS.shape else torch.zeros_like(c_TS)
    judged_SS = v_SS.T @ gram_2SS[judge] @ v_SS
    cc_SS, cp_SS, pp_SS = c_TS.T @ c_TS, c_TS.T @ p_TS, p_TS.T @ p_TS
    along_c_S, along_p_S = (judged_TS * c_TS).sum(dim=0), (judged_TS * p_TS).sum(dim=0)
    size, mean = target_2TT[judge].diagonal().sum(), gram_SS.diagonal().mean()
    errors = []
    for ridge in RIDGES:
        w = ridge * mean
        d_S = 1 / (value_S.clamp_min(0) + w)
        carried = (d_S[:, None] * d_S * (cc_SS + w * (cp_SS + cp_SS.T) + w * w * pp_SS) * judged_SS).sum()
        shared = (d_S * (along_c_S + w * along_p_S)).sum()
        errors.append(max(float((size - 2 * shared + carried) / size), ROUNDING) if size else ROUNDING)
    return errors
