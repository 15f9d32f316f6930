"""The regression that RegMean and Mix-of-Show's fusion share, solved on the factors: no dense update is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extensions.statistics.methods._recorded import Share, share_bias

# with a lower off-diagonal factor, the matrix with a diagonal of 1 has no eigenvalue under 1 - SHRUNKEN
SHRUNKEN = 0.99


def regression(found: Sequence[Share], *, off_diagonal: float, from_mean: bool) -> Factors:
    """Return the D that minimises sum of w_e tr((D - D_e) G_e (D - D_e)^T), and of all that do the one nearest to the start.

    The start is the weighted mean of the updates, or zero (the base model). G_e has its off-diagonal multiplied by
    `off_diagonal`; of a turned layer, D^T stands for D. With S = sum of w_e G_e and P the projection onto its range,
    D = sum of b_e (w_e a_e G_e S^+  [+ w_e / sum of w * a_e (1 - P)]), of rank sum of R_e. Solved in float64.
    """
    weight_sum, turned = sum(share.weight for share in found), any(share.seen.turned for share in found)
    inputs = _Inputs.of(found, off_diagonal)
    parts_a, parts_b = [], []
    for share in found:
        if share.term is None:
            continue
        factors = share.term.factors
        a_RI, b_OR = (factors.b_OR.T, factors.a_RI.T) if turned else (factors.a_RI, factors.b_OR)
        a_RI = a_RI.double()
        new_RI = inputs.applied(a_RI @ (_shrink_gram(share, off_diagonal) * share.weight))
        if from_mean:
            new_RI += inputs.unseen(a_RI) * (share.weight / weight_sum)
        parts_a.append(new_RI)
        parts_b.append(b_OR.float())
    first = next(share.term for share in found if share.term is not None).factors
    a_RI, b_OR = torch.cat(parts_a).float(), torch.cat(parts_b, dim=1)
    a_RI, b_OR = (b_OR.T, a_RI.T) if turned else (a_RI, b_OR)
    return replace(first, a_RI=a_RI, b_OR=b_OR, bias_O=share_bias(found))


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The pseudo-inverse S^+ and the projection onto the range of S = sum of w_e G_e, the experts' weighted Gram matrices.

    Sizes vary by input over many orders of magnitude. Inputs that were always 0 (`live_I` false) are left out, the others
    scaled to a diagonal of 1: the rounding of a Gram matrix is relative to its diagonal, so its numerical rank is, too.
    `basis_IK` spans the range where not all live inputs do.
    """

    live_I: Tensor
    scale_I: Tensor
    lower_II: Tensor
    basis_IK: Tensor | None

    @classmethod
    def of(cls, found: Sequence[Share], off_diagonal: float) -> _Inputs:
        s_II = _shrink_gram(found[0], off_diagonal) * found[0].weight
        for share in found[1:]:
            s_II += _shrink_gram(share, off_diagonal) * share.weight
        live_I = s_II.diagonal() > 0
        if not bool(live_I.all()):
            s_II = s_II[live_I][:, live_I]
        scale_I = s_II.diagonal().rsqrt()
        m_II = s_II * scale_I[:, None] * scale_I
        if off_diagonal <= SHRUNKEN:
            return cls(live_I, scale_I, torch.linalg.cholesky(m_II), None)
        values_I, vectors_II = torch.linalg.eigh(m_II)
        # the Gram matrices are fp32: smaller eigenvalues are rounding, not directions of the inputs
        least = len(values_I) * torch.finfo(torch.float32).eps
        kept_I = values_I > least * values_I[-1:]
        vectors_IK, values_K = vectors_II[:, kept_I], values_I[kept_I]
        if len(values_K) == len(values_I):
            return cls(live_I, scale_I, torch.linalg.cholesky(m_II), None)
        # S = C C^T with C = scale^-1 V root(values) of full column rank; C = Q R gives S^+ = Q (R R^T)^-1 Q^T
        basis_IK, r_KK = torch.linalg.qr(vectors_IK * values_K.sqrt() / scale_I[:, None])
        return cls(live_I, scale_I, r_KK, basis_IK)

    def applied(self, rows_RI: Tensor) -> Tensor:
        """Return `rows_RI` times S^+, (R, I)."""
        result_RI = torch.zeros_like(rows_RI)
        rows_RL = rows_RI[:, self.live_I]
        if self.basis_IK is None:
            scaled_LR = (rows_RL * self.scale_I).T
            result_RI[:, self.live_I] = torch.cholesky_solve(scaled_LR, self.lower_II).T * self.scale_I
            return result_RI
        half_KR = torch.linalg.solve_triangular(self.lower_II, (rows_RL @ self.basis_IK).T, upper=True)
        whole_KR = torch.linalg.solve_triangular(self.lower_II.T, half_KR, upper=False)
        result_RI[:, self.live_I] = (self.basis_IK @ whole_KR).T
        return result_RI

    def unseen(self, rows_RI: Tensor) -> Tensor:
        """Return rows (1 - P) (R, I): the part of the rows that acts on inputs that no expert has seen."""
        result_RI = rows_RI.clone()
        rows_RL = rows_RI[:, self.live_I]
        seen_RL = rows_RL if self.basis_IK is None else (rows_RL @ self.basis_IK) @ self.basis_IK.T
        result_RI[:, self.live_I] = rows_RL - seen_RL
        return result_RI


def _shrink_gram(share: Share, off_diagonal: float) -> Tensor:
    assert share.seen.gram_II is not None
    gram_II = share.seen.gram_II.double()
    if off_diagonal == 1.0:
        return gram_II
    diagonal_I = gram_II.diagonal().clone()
    gram_II = gram_II * off_diagonal
    gram_II.diagonal().copy_(diagonal_I)
    return gram_II
