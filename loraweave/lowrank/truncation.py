"""The best approximation of low-rank updates at a smaller rank: exact, without forming the dense update.

With S rank rows, the singular values of b a are the square roots of the eigenvalues of L^T (b^T b) L, where L L^T = a a^T:
two S x S Gram matrices in float64 and the wanted part of one S x S eigen-decomposition. A Gram matrix holds squares, so
figures 8 digits below the largest drown in its rounding; where that could be seen, two QR decompositions and the SVD of
the S x S core take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from loraweave.common.threads import one_blas_thread
from loraweave.errors import AdapterUnsupported
from loraweave.types import Factors

Array = NDArray[np.float64]
Triplets = tuple[Array, Array, float]

# shares of |a a^T| |b^T b|, whose rounding is 1e-16: above, vectors are right to 1e-9 and the energy cut off to 1e-7
SMALLEST_VECTOR = 1e-7
SMALLEST_TAIL = 1e-8
# multiplications of one update: up to the first a thread is not worth starting, from the second BLAS uses its own threads
SMALL, LARGE = 1e7, 1e9
# below, a whole eigen-decomposition costs less than a part of it
PARTIAL_FROM = 80


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Return the best approximation of b a at `rank` or less (Eckart-Young), and its relative Frobenius error, 0 to 1.

    Right to 1e-8 of |b a| before the factors are rounded to their dtype, and to 1e-15 of |a| |b| where terms cancel; the
    error is that of the cut, without the rounding. b has orthogonal columns, a orthogonal rows of the same norms, and the
    largest entry of each column of b is positive. Gain and bias are kept as they are. `rank` at or above the update's own
    gives the update back itself, with error 0. Raises AdapterUnsupported for a rank below 1, and for a cut of DoRA, whose
    magnitude belongs to the whole b a.
    """
    if rank < 1:
        raise AdapterUnsupported(f"rank {rank} is below 1; an update without rank rows is no adapter")
    if rank >= factors.rank:
        return factors, 0.0
    if factors.magnitude_O is not None:
        raise AdapterUnsupported(
            f"cannot cut DoRA from rank {factors.rank} to {rank}: its magnitude belongs to the whole update; make it a "
            "plain LoRA with the model first (lw.to_lora)"
        )
    return _compressed(factors, _float64(factors.a_RI), _float64(factors.b_OR), rank)


def components(factors: Factors) -> list[Factors]:
    """Return the singular components of b a as updates of rank 1, the strongest first; their sum is the update.

    However the factors are written, the components are the same wherever singular values differ. Gain and bias stay with
    the first. Raises AdapterUnsupported for an update that needs its base layer.
    """
    if not factors.bound:
        raise AdapterUnsupported(
            "an update that needs its base layer (DoRA, a trained bias) has no components of its own: take the bound_pool "
            "of a Composer(model, pool)"
        )
    a_SI, b_OS = _float64(factors.a_RI), _float64(factors.b_OR)
    rank = min(factors.rank, b_OS.shape[0], a_SI.shape[1])
    if rank == 0:
        return [factors]
    with one_blas_thread(_products(factors.rank, b_OS.shape[0], a_SI.shape[1]) < LARGE):
        a_RI, b_OR, _ = truncated(a_SI, b_OS, rank)
    first, *rest = (
        replace(
            factors,
            a_RI=torch.from_numpy(a_RI[[place]]).to(factors.a_RI),
            b_OR=torch.from_numpy(b_OR[:, [place]]).to(factors.b_OR),
        )
        for place in range(rank)
    )
    return [first, *(replace(component, gain_O=None, bias_O=None) for component in rest)]


class CutSum(NamedTuple):
    """A weighted sum at a smaller rank, the relative error of the cut, and <w_i D_i, w_j D_j> where the cut needed it."""

    factors: Factors
    error: float
    inner_EE: Array | None


def compress_sum(updates: Sequence[Factors], weights: Sequence[float], rank: int) -> CutSum:
    """Compress the sum of w_e b_e a_e as `compress` does, with nothing rounded before the cut.

    Weighted factors in fp32 are off by 3e-8, and a cut between close singular values makes more of that. Gains and biases
    sum with the weights. The updates are bound and of one shape and kind, at least one; a sum of at most `rank` rank rows is
    exact. Raises AdapterUnsupported for a rank below 1.
    """
    if rank < 1:
        raise AdapterUnsupported(f"rank {rank} is below 1; an update without rank rows is no adapter")
    first = updates[0]
    num_out, num_in = first.b_OR.shape[0], first.a_RI.shape[1]
    total = sum(update.rank for update in updates)
    a_SI, b_OS = np.empty((total, num_in)), np.empty((num_out, total))
    start = 0
    for update, weight in zip(updates, weights, strict=True):
        rows = slice(start, start + update.rank)
        a_SI[rows] = _numpy(update.a_RI)
        np.multiply(_numpy(update.b_OR), weight, out=b_OS[:, rows], dtype=np.float64)
        start += update.rank
    summed = replace(
        first,
        gain_O=_weighted([update.gain_O for update in updates], weights),
        bias_O=_weighted([update.bias_O for update in updates], weights),
    )
    if total >= min(num_out, num_in):
        return CutSum(*_compressed(summed, a_SI, b_OS, rank), None)
    with one_blas_thread(_products(total, num_out, num_in) < LARGE):
        grams = a_SI @ a_SI.T, b_OS.T @ b_OS
    cut = _compressed(summed, a_SI, b_OS, rank, grams)
    return CutSum(*cut, summed_by_owner(grams[0] * grams[1], [update.rank for update in updates]))


def summed_by_owner(product_SS: Array, ranks: Sequence[int]) -> Array:
    """Sum the blocks of rows and columns that belong to one update each, as (E, E); `ranks` are the blocks' sizes."""
    present = [place for place, rank in enumerate(ranks) if rank]
    starts = [sum(ranks[:place]) for place in present]
    # sums from each start to the next, so that updates of no rows have no place in it
    sums_EE: Array = np.add.reduceat(np.add.reduceat(product_SS, starts, axis=0), starts, axis=1) if present else product_SS
    return sums_EE if len(present) == len(ranks) else among(sums_EE, present, len(ranks))


def among(values_PP: Array, places: Sequence[int], size: int) -> Array:
    """Return a matrix (size, size) of zeros with these values in the rows and columns of `places`."""
    matrix = np.zeros((size, size), dtype=values_PP.dtype)
    matrix[np.ix_(places, places)] = values_PP
    return matrix


def worth_a_thread(updates: Sequence[Factors]) -> bool:
    """Return whether cutting the sum of updates of one layer takes longer, by far, than handing it to a thread."""
    if not updates:
        return False
    num_out, num_in = updates[0].b_OR.shape[0], updates[0].a_RI.shape[1]
    return _products(sum(update.rank for update in updates), num_out, num_in) > SMALL


def truncated(a_SI: Array, b_OS: Array, rank: int, grams: tuple[Array, Array] | None = None) -> Triplets:
    """Return (a_RI, b_OR, error) of the best approximation of b a; `rank` is at most the smaller of O, S and I.

    `grams` are a a^T and b^T b if they are known already; they stay as they are.
    """
    num_out, num_in = b_OS.shape[0], a_SI.shape[1]
    triplets = None
    if a_SI.shape[0] < min(num_out, num_in):
        triplets = _by_grams(a_SI, b_OS, rank, *(grams or (a_SI @ a_SI.T, b_OS.T @ b_OS)))
    elif num_out <= num_in:
        triplets = by_dense_gram(b_OS @ a_SI, rank)
    else:
        turned = by_dense_gram(a_SI.T @ b_OS.T, rank)
        triplets = None if turned is None else (turned[1].T, turned[0].T, turned[2])
    a_RI, b_OR, error = _by_qr(a_SI, b_OS, rank) if triplets is None else triplets
    sign_R = column_signs(b_OR)
    return a_RI * sign_R[:, None], b_OR * sign_R, error


def _by_grams(a_SI: Array, b_OS: Array, rank: int, gram_a_SS: Array, gram_b_SS: Array) -> Triplets | None:
    """Truncate by Gram matrices, or return None if their rounding could be seen."""
    size = float(np.linalg.norm(gram_a_SS) * np.linalg.norm(gram_b_SS))
    if size == 0.0:
        return _nothing(a_SI, b_OS, rank)
    # the transpose of a symmetric matrix is itself, in the order of columns that LAPACK wants
    lower_SS, failed = lapack.dpotrf(gram_a_SS.T, lower=1, clean=1)
    if failed:
        return None
    core_SS, _ = lapack.dsygst(gram_b_SS.T, lower_SS, itype=3, lower=1)
    total = float(core_SS.trace())
    energy_R, vectors_SR = top_eigenpairs(core_SS, rank)
    tail = total - float(energy_R.sum())
    if not _trusted(energy_R, tail, size):
        return None
    # the left singular vectors are u = b L v / sigma, and a gets u^T (b a): L is never divided by
    mix_SR = (lower_SS @ vectors_SR) * energy_R**-0.25
    return (energy_R[:, None] ** -0.5 * (mix_SR.T @ gram_b_SS)) @ a_SI, b_OS @ mix_SR, (tail / total) ** 0.5


def by_dense_gram(delta_OI: Array, rank: int) -> Triplets | None:
    """Return (a_RI, b_OR, error) of a dense matrix with O <= I; None where the rounding of its Gram matrix could be seen."""
    gram_OO = delta_OI @ delta_OI.T
    size, total = float(np.linalg.norm(gram_OO)), float(gram_OO.trace())
    if total == 0.0:
        return _nothing(delta_OI, delta_OI, rank)
    energy_R, vectors_OR = top_eigenpairs(gram_OO.T, rank)
    tail = total - float(energy_R.sum())
    if not _trusted(energy_R, tail, size):
        return None
    root_R = energy_R**0.25
    return (vectors_OR / root_R).T @ delta_OI, vectors_OR * root_R, (tail / total) ** 0.5


def top_eigenpairs(symmetric_SS: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the `rank` largest eigenvalues, falling, and their vectors as columns; reads and overwrites the lower triangle.

    In the precision of the matrix, which is best given in column-major order.
    """
    size = symmetric_SS.shape[0]
    kind = "s" if symmetric_SS.dtype == np.float32 else "d"
    if size < PARTIAL_FROM or 2 * rank > size:
        values, vectors, failed = getattr(lapack, kind + "syevd")(symmetric_SS, lower=1, overwrite_a=1)
    else:
        values, vectors, _, _, failed = getattr(lapack, kind + "syevr")(
            symmetric_SS, range="I", il=size - rank + 1, iu=size, lower=1, overwrite_a=1
        )
        values = values[:rank]
    if failed:
        raise np.linalg.LinAlgError(f"the eigen-decomposition of a {size} x {size} matrix did not converge")
    return values[-rank:][::-1], vectors[:, -rank:][:, ::-1]


def column_signs(b_OR: NDArray[Any]) -> NDArray[Any]:
    """Return the sign of the largest entry of each column; 1 for a column of zeros."""
    largest_R = np.abs(b_OR).argmax(axis=0)
    return np.where(b_OR[largest_R, np.arange(b_OR.shape[1])] < 0, -1.0, 1.0).astype(b_OR.dtype)


def _compressed(
    like: Factors, a_SI: Array, b_OS: Array, rank: int, grams: tuple[Array, Array] | None = None
) -> tuple[Factors, float]:
    """Return the truncation of b a as factors with all other fields of `like`."""
    num_out, num_in = b_OS.shape[0], a_SI.shape[1]
    if rank >= a_SI.shape[0]:
        a_RI, b_OR, error = a_SI, b_OS, 0.0
    else:
        with one_blas_thread(_products(a_SI.shape[0], num_out, num_in) < LARGE):
            a_RI, b_OR, error = truncated(a_SI, b_OS, min(rank, num_out, num_in), grams)
    tensor = like.b_OR
    return replace(like, a_RI=torch.from_numpy(a_RI).to(tensor), b_OR=torch.from_numpy(b_OR).to(tensor)), error


def _products(stack: int, num_out: int, num_in: int) -> float:
    return float(stack**2 * (num_out + num_in))


def _float64(tensor: Tensor) -> Array:
    # numpy's conversion: torch would use all threads for it
    return _numpy(tensor).astype(np.float64)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    values = tensor.detach().cpu()
    return values.numpy() if values.dtype == torch.float32 else values.double().numpy()


def _weighted(parts: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    present = [part.double() * weight for part, weight in zip(parts, weights, strict=True) if part is not None]
    return torch.stack(present).sum(dim=0).float() if present else None


def _trusted(energy_R: Array, tail: float, size: float) -> bool:
    smallest = float(energy_R[-1])
    return (
        smallest > 0.0 and (smallest * float(energy_R[0])) ** 0.5 >= SMALLEST_VECTOR * size and tail >= SMALLEST_TAIL * size
    )


def _by_qr(a_SI: Array, b_OS: Array, rank: int) -> Triplets:
    q_OS, left_SS = np.linalg.qr(b_OS)
    p_IS, right_SS = np.linalg.qr(a_SI.T)
    u_SS, sigma_S, vh_SS = np.linalg.svd(left_SS @ right_SS.T, full_matrices=False)
    root_R = np.sqrt(sigma_S[:rank])
    total, tail = float(np.square(sigma_S).sum()), float(np.square(sigma_S[rank:]).sum())
    a_RI, b_OR = (root_R[:, None] * vh_SS[:rank]) @ p_IS.T, q_OS @ (u_SS[:, :rank] * root_R)
    return a_RI, b_OR, (tail / total) ** 0.5 if total else 0.0


def _nothing(a_SI: Array, b_OS: Array, rank: int) -> Triplets:
    return np.zeros((rank, a_SI.shape[1])), np.zeros((b_OS.shape[0], rank)), 0.0
