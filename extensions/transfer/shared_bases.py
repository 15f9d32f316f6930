"""One pair of bases for many updates of a layer: D_i = b_i a_i is near U M_i V, and each keeps only its small M_i.

Compress then Serve (Gabrielsson et al. 2024, arXiv 2407.00066) fits U (O, R) and V (R, I) to the sum of |D_i - U M_i V|^2,
with M_i full ("full", U and V orthonormal) or diagonal ("diagonal", not orthonormal then). SHARE (arXiv 2602.06043) and
EigenLoRAx (arXiv 2502.04700) take principal directions of the factors as U and V, which depend on how b a was split; these
do not. Each D_i counts with norm 1, so that large updates do not decide for all. No D_i is ever made: b (a X) is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import algebra

Middle = Literal["full", "diagonal"]
# rounds of the alternation, and steps of the power method in each; more change the error by less than 2 % of it
ROUNDS, STEPS = 12, 3


@dataclass(frozen=True, eq=False)
class Basis:
    """The bases that a layer's updates share, in fp32: update i is near u_OR M_i v_RI, with a small M_i of its own."""

    u_OR: Tensor
    v_RI: Tensor


def fit(updates: list[Factors], rank: int, middle: Middle = "full", seed: int = 0) -> Basis:
    """Fit the bases for one layer's updates, of `rank`, or of fewer directions if the updates have fewer."""
    num_out, num_in = updates[0].b_OR.shape[0], updates[0].a_RI.shape[1]
    b_EOR, a_ERI = _stacked(updates)
    rank = min(rank, num_out, num_in, max(1, sum(update.rank for update in updates)))
    generator = torch.Generator().manual_seed(seed)
    v_IR = _orthonormal(torch.randn(num_in, rank, generator=generator))
    u_OR = _orthonormal(torch.randn(num_out, rank, generator=generator))
    for _ in range(ROUNDS):
        u_OR = _turned(b_EOR @ (a_ERI @ v_IR), u_OR)
        v_IR = _turned(a_ERI.mT @ (b_EOR.mT @ u_OR), v_IR)
    if middle == "diagonal":
        u_OR, v_IR = _diagonalised(b_EOR, a_ERI, u_OR, v_IR)
    return Basis(u_OR.contiguous(), v_IR.T.contiguous())


def project(update: Factors, basis: Basis, middle: Middle = "full") -> Tensor:
    """Return the middle M (R, R), or its diagonal (R,), for which U M V is nearest to the update b a, fp32."""
    u_OR, v_RI = basis.u_OR.double(), basis.v_RI.double()
    inner_RR = (u_OR.T @ update.b_OR.double()) @ (update.a_RI.double() @ v_RI.T)
    if middle == "diagonal":
        gram_RR = (u_OR.T @ u_OR) * (v_RI @ v_RI.T)
        return _solved(gram_RR, inner_RR.diagonal()[None])[0]
    return inner_RR.float()


def squared_error(update: Factors, basis: Basis, middle_RR: Tensor) -> float:
    """Return |D - U M V|^2, without forming D."""
    u_OR, v_RI, m_RR = basis.u_OR.double(), basis.v_RI.double(), as_matrix(middle_RR).double()
    b_OR, a_RI = update.b_OR.double(), update.a_RI.double()
    cross = (((u_OR.T @ b_OR) @ (a_RI @ v_RI.T)) * m_RR).sum()
    theirs = ((u_OR.T @ u_OR @ m_RR @ (v_RI @ v_RI.T)) * m_RR).sum()
    return max(algebra.inner(update, update) + float(theirs - 2 * cross), 0.0)


def as_matrix(middle: Tensor) -> Tensor:
    return torch.diag(middle) if middle.ndim == 1 else middle


def _stacked(updates: list[Factors]) -> tuple[Tensor, Tensor]:
    """Stack updates as (b_EOR, a_ERI), scaled to norm 1 and filled up with zeros to one rank."""
    rank = max(update.rank for update in updates)
    b_EOR = torch.zeros(len(updates), updates[0].b_OR.shape[0], rank)
    a_ERI = torch.zeros(len(updates), rank, updates[0].a_RI.shape[1])
    for place, update in enumerate(updates):
        b_EOR[place, :, : update.rank] = update.b_OR / (algebra.norm(update) or 1.0)
        a_ERI[place, : update.rank] = update.a_RI
    return b_EOR, a_ERI


def _turned(parts_EOR: Tensor, columns_OR: Tensor) -> Tensor:
    """Return `columns_OR` after STEPS steps of the power method towards the top eigenvectors of sum over e of P_e P_e^T."""
    wide = parts_EOR.transpose(0, 1).flatten(1)
    for _ in range(STEPS):
        columns_OR = _orthonormal(wide @ (wide.T @ columns_OR))
    return columns_OR


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _diagonalised(b_EOR: Tensor, a_ERI: Tensor, u_OR: Tensor, v_IR: Tensor) -> tuple[Tensor, Tensor]:
    """Fit D_e ~ U diag(s_e) V by alternating least squares over s, U and V, whose columns keep norm 1; return (U, V)."""
    for _ in range(ROUNDS):
        inner_ES = torch.einsum("eos,os->es", b_EOR @ (a_ERI @ v_IR), u_OR)
        s_ER = _solved((u_OR.T @ u_OR) * (v_IR.T @ v_IR), inner_ES)
        u_OR = _solved((v_IR.T @ v_IR) * (s_ER.T @ s_ER), torch.einsum("eor,er->or", b_EOR @ (a_ERI @ v_IR), s_ER))
        u_OR = u_OR / u_OR.norm(dim=0).clamp_min(1e-12)
        right = a_ERI.mT @ (b_EOR.mT @ u_OR)
        s_ER = _solved((u_OR.T @ u_OR) * (v_IR.T @ v_IR), torch.einsum("eir,ir->er", right, v_IR))
        v_IR = _solved((u_OR.T @ u_OR) * (s_ER.T @ s_ER), torch.einsum("eir,er->ir", right, s_ER))
        v_IR = v_IR / v_IR.norm(dim=0).clamp_min(1e-12)
    return u_OR, v_IR


def _solved(gram_RR: Tensor, given: Tensor) -> Tensor:
    """Return `given` times the pseudo-inverse of the Gram matrix, which leaves out nearly dependent directions."""
    inverse: Tensor = torch.linalg.pinv(gram_RR.double(), hermitian=True, rtol=1e-9)
    return (given.double() @ inverse).float()
