"""The common parts of the spectral merge methods: every expert's singular values, orthonormal bases, and the way back.

Nothing here forms a dense update: with S the sum of the experts' ranks, all work is on (O, S), (I, S) and (S, S). Shape
letters beside those of `loraweave.types`: P and Q are the dimensions of the joint column space and row space.

Every expert is first reduced to the compact SVD of its update, so that nothing depends on how the update was split into
factors. Everything runs in float64; singular values of a stack come from its Gram matrix, whose relative error is 1e-16
for the largest and below 1e-5 for the smallest that counts (see `NULL`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend.merging import Experts, Term, Weights, terms, weighted_bias

# A direction counts as null when it is this small beside the largest: 32 units in the last place of fp32, which is what
# rounding the factors of one and the same update to fp32 can make of nothing.
NULL = 2.0**-18

# below this ratio of eigenvalues, vectors from a Gram matrix are made orthonormal once more
UNEVEN = 1e-8


@dataclass(frozen=True, eq=False)
class Spectrum:
    """An expert's update as u diag(s) v^T in float64, s positive and descending, null directions left out.

    `place` is the expert's index among all experts of the merge.
    """

    u_OR: Tensor
    s_R: Tensor
    v_IR: Tensor
    weight: float
    place: int

    @property
    def rank(self) -> int:
        return int(self.s_R.shape[0])

    @property
    def norm(self) -> float:
        return float(self.s_R.norm())


def opened(experts: Experts, weights: Weights, scale: float = 1.0) -> tuple[Factors, Tensor | None, list[Spectrum]]:
    """Return (the first expert's factors, scale * sum of w_e bias_e or None, the spectra of the updates that are not zero).

    The first factors tell the kind and kernel size of the result.
    """
    terms_E = terms(experts, weights)
    return terms_E[0].factors, scaled_bias(terms_E, scale), [spectrum for spectrum in spectra(terms_E) if spectrum.rank]


def spectra(found: Sequence[Term]) -> list[Spectrum]:
    """Return the compact SVD of every term's update, in order; of rank 0 for an update of zeros."""
    by_rank: dict[int, list[int]] = {}
    for index, term in enumerate(found):
        by_rank.setdefault(term.factors.rank, []).append(index)
    parts: dict[int, Spectrum] = {}
    for members in by_rank.values():
        q_EOR, x_ERR = torch.linalg.qr(torch.stack([found[index].factors.b_OR for index in members]).double())
        p_EIR, y_ERR = torch.linalg.qr(torch.stack([found[index].factors.a_RI for index in members]).double().mT)
        u_ERR, s_ER, vh_ERR = torch.linalg.svd(x_ERR @ y_ERR.mT, full_matrices=False)
        u_EOR, v_EIR = q_EOR @ u_ERR, p_EIR @ vh_ERR.mT
        for row, index in enumerate(members):
            keep = counted(s_ER[row])
            parts[index] = Spectrum(
                u_EOR[row, :, :keep], s_ER[row, :keep], v_EIR[row, :, :keep], found[index].weight, found[index].place
            )
    return [parts[index] for index in range(len(found))]


def counted(s_R: Tensor, *, beside: float | None = None) -> int:
    """Return how many of the descending singular values are above `NULL` times the largest, or times `beside`."""
    if s_R.numel() == 0:
        return 0
    largest = float(s_R[0]) if beside is None else beside
    return int((s_R > NULL * largest).sum()) if largest > 0.0 else 0


def gram_svd(stack_NS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t_SP, s_P, vh_PS) of a stack whose thin SVD is (stack t) diag(s) vh; s descends, without null directions.

    Only the smaller of its two Gram matrices is decomposed; callers form the tall u = stack t where they need it.
    """
    num_rows, num_columns = stack_NS.shape
    if num_rows >= num_columns:
        return _of_gram(stack_NS.T @ stack_NS)
    u_NP, s_P, _ = _of_gram(stack_NS @ stack_NS.T)
    u_NP = u_NP * s_P
    vh_PS = (stack_NS.T @ (u_NP / s_P)).T
    return vh_PS.T / s_P, s_P, vh_PS


def _of_gram(gram_SS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t_SP, s_P, vh_PS) of a stack with this Gram matrix of columns, its thin SVD being (stack t) diag(s) vh."""
    square_S, w_SS = torch.linalg.eigh(gram_SS)
    s_S, w_SS = square_S.clamp(min=0.0).sqrt().flip(0), w_SS.flip(1)
    keep = counted(s_S)
    s_P, w_SP = s_S[:keep], w_SS[:, :keep]
    t_SP = w_SP / s_P
    if keep and float(s_P[-1]) ** 2 < UNEVEN * float(s_P[0]) ** 2:
        excess_PP = t_SP.T @ gram_SS @ t_SP - torch.eye(keep, dtype=t_SP.dtype)
        t_SP = t_SP - t_SP @ (excess_PP / 2)
    return t_SP, s_P, w_SP.T


@dataclass(frozen=True, eq=False)
class Joint:
    """All experts side by side: directions u_OS and v_IS, orthonormal within each expert, singular values and weights."""

    u_OS: Tensor
    v_IS: Tensor
    s_S: Tensor
    weight_S: Tensor
    ranks: list[int]

    @property
    def size_S(self) -> Tensor:
        """The singular values w_e s of the weighted updates, with the sign of the weight."""
        return self.s_S * self.weight_S

    def each(self, x_NS: Tensor) -> list[Tensor]:
        """Split the S columns of a tensor by expert, in order."""
        ends = list(itertools.accumulate(self.ranks, initial=0))
        return [x_NS[:, start:end] for start, end in itertools.pairwise(ends)]


def joint(parts: Sequence[Spectrum]) -> Joint:
    """Return the experts' spectra concatenated, in order."""
    weights = [torch.full_like(spectrum.s_R, spectrum.weight) for spectrum in parts]
    return Joint(
        torch.cat([spectrum.u_OR for spectrum in parts], dim=1),
        torch.cat([spectrum.v_IR for spectrum in parts], dim=1),
        torch.cat([spectrum.s_R for spectrum in parts]),
        torch.cat(weights),
        [spectrum.rank for spectrum in parts],
    )


def shared_basis(direction_NS: Tensor, size_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return (basis_NP, direction_PS): an orthonormal basis of the span of unit vectors, and these vectors in it.

    The basis vectors come most used first. They are the left singular vectors of direction diag(size): for the left singular
    vectors and singular values of all updates, those of [D_1 | D_2 | ...]; for the right ones, of the updates one above the
    other. So neither weights, nor the order of experts, nor how an update was split into factors has any part in it. Every
    vector's entry of largest magnitude is positive. For equal singular values the vectors are one choice of many.
    """
    stack_NS = direction_NS * size_S
    if direction_NS.shape[0] >= direction_NS.shape[1]:
        gram_SS = direction_NS.T @ direction_NS
        t_SP, _, _ = _of_gram(size_S[:, None] * gram_SS * size_S)
        basis_NP, direction_PS = stack_NS @ t_SP, (t_SP.T * size_S) @ gram_SS
    else:
        basis_NP = stack_NS @ gram_svd(stack_NS)[0]
        direction_PS = basis_NP.T @ direction_NS
    hidden_S = 1.0 - direction_PS.square().sum(dim=0) > NULL**2
    if bool(hidden_S.any()):
        # an update far smaller than the others hides below the tolerance, but its directions must not be lost
        rest_NH = direction_NS[:, hidden_S] - basis_NP @ direction_PS[:, hidden_S]
        basis_NP = torch.linalg.qr(torch.cat([basis_NP, rest_NH @ gram_svd(rest_NH)[0]], dim=1))[0]
        direction_PS = basis_NP.T @ direction_NS
    sign_P = _signs(basis_NP)
    return basis_NP * sign_P, direction_PS * sign_P[:, None]


def _signs(basis_NP: Tensor) -> Tensor:
    """Return -1 for vectors whose entry of largest magnitude (the first of several) is negative, 1 for the others."""
    peak_1P = basis_NP.gather(0, basis_NP.abs().argmax(dim=0, keepdim=True))
    return torch.where(peak_1P[0] < 0, -1.0, 1.0).double()


def core_factors(parts: Spectrum, left_PR: Tensor | None = None, right_QR: Tensor | None = None) -> Factors:
    """Return an expert's update as balanced fp32 factors: b = u sqrt(s), a = sqrt(s) v^T.

    `left_PR` and `right_QR`, where given, replace u and v by their coordinates in a basis.

    Coordinates that are only rounding (2^-20 beside the largest) become zeros, so that experts that share no direction
    share no entry either: elementwise rules count entries.
    """
    root_R = parts.s_R.sqrt()
    b_PR = parts.u_OR * root_R if left_PR is None else clean(left_PR * root_R)
    a_QR = parts.v_IR * root_R if right_QR is None else clean(right_QR * root_R)
    return Factors(a_QR.T.float().contiguous(), b_PR.float())


def assemble(
    first: Factors,
    experts_S: Joint,
    core_PQ: Tensor,
    sides: tuple[Tensor, Tensor],
    bias_O: Tensor | None,
    *,
    num: int,
    scale: float,
) -> Factors:
    """Return the update (u left) core (v right)^T as fp32 factors of the kind of `first`; u and v are those of `experts_S`.

    `sides` is (left_SP, right_SQ). A core of shape (num, num) has full rank and stays as it is. Any other is split evenly
    over both factors, without singular values below 1e-12 * |scale| * the largest of the experts'.
    """
    if core_PQ.shape == (num, num):
        return as_factors(first, experts_S.u_OS @ sides[0], (core_PQ @ sides[1].T) @ experts_S.v_IS.T, bias_O)
    left_OP, right_IQ = experts_S.u_OS @ sides[0], experts_S.v_IS @ sides[1]
    floor = 1e-12 * float(experts_S.size_S.abs().max()) * abs(scale)
    u_PR, s_R, vh_RQ = torch.linalg.svd(core_PQ, full_matrices=False)
    keep = int((s_R > floor).sum())
    root_R = s_R[:keep].sqrt()
    return as_factors(first, (left_OP @ u_PR[:, :keep]) * root_R, (root_R[:, None] * vh_RQ[:keep]) @ right_IQ.T, bias_O)


def as_factors(first: Factors, b_OR: Tensor, a_RI: Tensor, bias_O: Tensor | None) -> Factors:
    """Return factors b and a with the layer kind and convolution kernel of `first`, in fp32, in memory of their own."""
    return replace(first, a_RI=a_RI.float().contiguous(), b_OR=b_OR.float().contiguous(), bias_O=bias_O)


def scaled_bias(found: Sequence[Term], scale: float) -> Tensor | None:
    """Return scale * the sum of w_e bias_e, in fp32; None when no term has a bias."""
    bias_O = weighted_bias(found)
    return None if bias_O is None else bias_O * scale


def clean(x: Tensor) -> Tensor:
    """Return the tensor with entries of at most 2^-20 times the largest magnitude set to zero: they are only rounding."""
    magnitude = x.abs()
    bound = 2.0**-20 * float(magnitude.max()) if x.numel() else 0.0
    return x.masked_fill(magnitude <= bound, 0.0)
