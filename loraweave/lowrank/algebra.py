"""The algebra of low-rank updates: pure functions on factors that never form the dense delta unless asked to.

A layer's update is D = b a (+ a gain and a bias). Sums concatenate ranks, inner products and norms need only R x R
matrices, or dense ones where those are smaller: never more memory than the factors have. Reductions run in float64.

A cut is exact: the singular values of b a, of S rank rows, are the square roots of the eigenvalues of L^T (b^T b) L, where
L L^T = a a^T. A Gram matrix holds squares, so figures 8 digits below the largest drown in its rounding; where that could be
seen, two QR decompositions and the SVD of the S x S core take over.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from loraweave.common.process import one_blas_thread
from loraweave.errors import AdapterSuspicious, AdapterUnsupported, LayerMismatch
from loraweave.lowrank.factorise import column_signs, top_eigenpairs
from loraweave.types import Factors

Array = NDArray[np.float64]
Triplets = tuple[Array, Array, float]

# shares of |a a^T| |b^T b|, whose rounding is 1e-16: above, vectors are right to 1e-9 and the energy cut off to 1e-7
SMALLEST_VECTOR = 1e-7
SMALLEST_TAIL = 1e-8
# multiplications of one update from which BLAS uses its own threads
LARGE = 1e9
MAX_FP32 = torch.finfo(torch.float32).max


def delta(factors: Factors) -> Tensor:
    """Return the dense update b a as (O, I), fp32. Raises AdapterUnsupported if the update depends on the base weight."""
    _require_bound(factors)
    if factors.gain_O is not None:
        raise AdapterUnsupported("an update with a gain (DoRA, (IA)3) has no dense delta apart from the base weight")
    return factors.b_OR.float() @ factors.a_RI.float()


def bind(factors: Factors, weight_OI: Tensor, bias_O: Tensor | None) -> Factors:
    """Return the update in a form that no longer needs the base layer, given its weight and bias (None: no bias).

    DoRA (Liu et al. 2024, eq. 5) with m = magnitude: y = m/|W + b a| * (W + b a) x, hence gain = m/|W + b a| - 1 and b is
    scaled by 1 + gain. A trained bias becomes its difference to the base's.
    """
    if factors.bound:
        return factors
    b_OR, gain_O, extra_O = factors.b_OR, factors.gain_O, factors.bias_O
    if factors.magnitude_O is not None:
        dense_OI = weight_OI.double() + factors.b_OR.double() @ factors.a_RI.double()
        norm_O = dense_OI.norm(dim=1)
        if not bool(norm_O.all()):
            row = int((norm_O == 0).nonzero()[0])
            raise AdapterUnsupported(f"DoRA divides by the norm of W + b a, which is 0 in row {row} of this base's weight")
        ratio_O = factors.magnitude_O.double() / norm_O
        gain_O = (ratio_O - 1).float()
        b_OR = (factors.b_OR.double() * ratio_O[:, None]).float()
    if factors.base_bias_O is not None:
        base_O = torch.zeros_like(factors.base_bias_O) if bias_O is None else bias_O.float()
        difference_O = factors.base_bias_O - base_O
        extra_O = difference_O if extra_O is None else extra_O + difference_O
    return replace(factors, b_OR=b_OR, gain_O=gain_O, bias_O=extra_O, magnitude_O=None, base_bias_O=None)


def unbind(factors: Factors, weight_OI: Tensor) -> Factors:
    """Return the update with DoRA's magnitude instead of its gain, to be bound to the same base again.

    With r = 1 + gain, b is divided by r, and m = r |W + b a|. Raises AdapterUnsupported where r is 0 in a row of b that is
    not, which no magnitude expresses.
    """
    gain_O = torch.zeros(factors.b_OR.shape[0]) if factors.gain_O is None else factors.gain_O
    ratio_O = 1 + gain_O.double()
    gone_O = ratio_O == 0
    if bool(factors.b_OR[gone_O].any()):
        row = int((gone_O & factors.b_OR.any(dim=1)).nonzero()[0])
        raise AdapterUnsupported(f"the gain is -1 in row {row}, whose update is not zero: DoRA has no magnitude for that")
    b_OR = (factors.b_OR.double() / torch.where(gone_O, 1.0, ratio_O)[:, None]).float()
    norm_O = (weight_OI.double() + b_OR.double() @ factors.a_RI.double()).norm(dim=1)
    return replace(factors, b_OR=b_OR, gain_O=None, magnitude_O=(ratio_O * norm_O).float())


def scale(factors: Factors, weight: float) -> Factors:
    """Return weight * update; `factors` itself for 1. The weight multiplies b alone: on both factors it would be squared."""
    if weight == 1.0:
        return factors
    _require_bound(factors)
    return replace(
        factors,
        b_OR=factors.b_OR * weight,
        gain_O=None if factors.gain_O is None else factors.gain_O * weight,
        bias_O=None if factors.bias_O is None else factors.bias_O * weight,
    )


def negate(factors: Factors) -> Factors:
    """Return -update: exactly one factor changes its sign, since flipping both is the identity."""
    return scale(factors, -1.0)


def add(terms: Sequence[Factors]) -> Factors:
    """Return the exact sum of updates; ranks add up (concatenation). A single update is returned as it is."""
    first = terms[0]
    if len(terms) == 1:
        return first
    require_alike(terms)
    return replace(
        first,
        a_RI=torch.cat([term.a_RI for term in terms], dim=0),
        b_OR=torch.cat([term.b_OR for term in terms], dim=1),
        gain_O=_sum_present([term.gain_O for term in terms]),
        bias_O=_sum_present([term.bias_O for term in terms]),
    )


def require_alike(terms: Sequence[Factors]) -> None:
    """Raise AdapterUnsupported unless all updates are bound, LayerMismatch unless all have the same `signature`."""
    for term in terms:
        _require_bound(term)
        if signature(term) != signature(terms[0]):
            raise LayerMismatch(
                f"cannot add updates of a layer with (O, I, kind) {signature(term)} and {signature(terms[0])}"
            )


def inner(left: Factors, right: Factors) -> float:
    """Return <D_left, D_right> = tr(D_left^T D_right), from a a^T and b^T b (both R x R), or from D if that is smaller."""
    if left.rank * right.rank > left.b_OR.shape[0] * left.a_RI.shape[1]:
        delta_OI = left.b_OR.double() @ left.a_RI.double()
        other_OI = delta_OI if left is right else right.b_OR.double() @ right.a_RI.double()
        return float((delta_OI * other_OI).sum())
    b_RR = left.b_OR.double().T @ right.b_OR.double()
    a_RR = left.a_RI.double() @ right.a_RI.double().T
    return float((b_RR * a_RR).sum())


def norm(factors: Factors) -> float:
    """Return the Frobenius norm of b a."""
    # rounding can leave a square that is zero slightly below it
    return float(max(inner(factors, factors), 0.0) ** 0.5)


def orthonormal(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q_OR, core_RR, p_IR) with b a = q core p^T, the columns of q and of p orthonormal; float64."""
    p_IR, right_RR = torch.linalg.qr(a_RI.double().T)
    q_OR, left_RR = torch.linalg.qr(b_OR.double())
    return q_OR, left_RR @ right_RR.T, p_IR


def within_sides(factors: Factors) -> Factors:
    """Return the factors, or, if their rank is above min(O, I), an identity and the dense b a as factors, in float64."""
    num_out, num_in = factors.b_OR.shape[0], factors.a_RI.shape[1]
    if factors.rank <= min(num_out, num_in):
        return factors
    delta_OI = factors.b_OR.double() @ factors.a_RI.double()
    if num_out <= num_in:
        return replace(factors, a_RI=delta_OI, b_OR=torch.eye(num_out, dtype=torch.float64))
    return replace(factors, a_RI=torch.eye(num_in, dtype=torch.float64), b_OR=delta_OI)


def require_in_range(factors: Factors, where: str) -> None:
    """Raise AdapterSuspicious, which begins with `where`, if a partial sum of an entry of b a could overflow fp32."""
    # by Cauchy and Schwarz, the product of the Frobenius norms bounds the reach, and takes a fifth of the time
    if float(torch.linalg.vector_norm(factors.b_OR)) * float(torch.linalg.vector_norm(factors.a_RI)) <= MAX_FP32:
        return
    b_R = torch.linalg.vector_norm(factors.b_OR.detach().float(), torch.inf, dim=0).double()
    a_R = torch.linalg.vector_norm(factors.a_RI.detach().float(), torch.inf, dim=1).double()
    reach = float(b_R @ a_R)
    if reach > MAX_FP32:
        raise AdapterSuspicious(
            f"{where}: the product of its factors reaches {reach:.3g}, beyond what fp32 holds ({MAX_FP32:.3g}), so no "
            "composition with it would be a number; look at how it was trained, saved and scaled (lora_alpha)"
        )


def within_range(tensors: Iterable[Tensor]) -> bool:
    """Return True if all values, and all products and sums of products of two tensors, are surely finite in fp32.

    By Cauchy and Schwarz the norm of all tensors together bounds them, which takes one pass; tensors that fill one storage,
    as those read from a file do, are read as one vector. False may be a false alarm (it is for integers).
    """
    by_memory: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_floating_point():
            return False
        by_memory.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor.detach())
    total = 0.0
    for parts in by_memory.values():
        memory = parts[0].untyped_storage()
        if len(parts) > 1 and memory.nbytes() <= sum(part.nbytes for part in parts):
            parts = [parts[0].new_empty(0).set_(memory)]  # type: ignore[call-overload]
        total += sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)
    # it bounds |a| |b| of any two tensors, the same numbers counted in both or not
    return total <= MAX_FP32


def all_finite(tensor: Tensor) -> bool:
    """Return True if no value is NaN or infinite."""
    # either would be in the sum too, and a sum takes a tenth of the time
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def on_host(tensor: Tensor) -> Tensor:
    """Return the tensor for storage: detached, fp32, in this machine's memory; the tensor itself if it is so already."""
    # three calls that do nothing take longer than this question, and an adapter has hundreds of tensors
    if tensor.dtype is torch.float32 and tensor.is_cpu and not tensor.requires_grad:
        return tensor
    return tensor.detach().cpu().float()


def is_zero(factors: Factors) -> bool:
    """Return True if the update changes no output; False for an update that needs its base layer."""
    if not factors.bound:
        return False
    rest = [part for part in (factors.gain_O, factors.bias_O) if part is not None]
    return norm(factors) == 0.0 and not any(bool(part.any()) for part in rest)


def signature(factors: Factors) -> tuple[int, int, str, tuple[int, ...]]:
    return factors.b_OR.shape[0], factors.a_RI.shape[1], factors.kind, factors.kernel


def _sum_present(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(dim=0) if present else None


def _require_bound(factors: Factors) -> None:
    if not factors.bound:
        feature = "DoRA's magnitude" if factors.magnitude_O is not None else "a trained base bias"
        raise AdapterUnsupported(f"{feature} needs the base layer: bind the adapter to its model first (Composer does)")


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Return the best approximation of b a at `rank` or less (Eckart-Young), and its relative Frobenius error, 0 to 1.

    Right to 1e-8 of |b a| before the factors are rounded to their dtype, and to 1e-15 of |a| |b| where terms cancel; the
    error is that of the cut, without the rounding. b has orthogonal columns, a orthogonal rows of the same norms, and the
    largest entry of each column of b is positive. Gain and bias are kept as they are. `rank` at or above the update's own
    gives the update back itself, with error 0. Raises AdapterUnsupported for a rank below 1, and for a cut of DoRA, whose
    magnitude belongs to the whole b a.
    """
    if rank < 1:
        raise AdapterUnsupported(f"rank is {rank}; it must be at least 1")
    if rank >= factors.rank:
        return factors, 0.0
    if factors.magnitude_O is not None:
        why = "its magnitude belongs to the whole update; make it a plain LoRA with the model first (lw.to_lora)"
        raise AdapterUnsupported(f"cannot cut DoRA from rank {factors.rank} to {rank}: {why}")
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
    """A weighted sum cut to a smaller rank, the cut's relative error, and <w_i D_i, w_j D_j> if the cut computed these."""

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
        raise AdapterUnsupported(f"rank is {rank}; it must be at least 1")
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
        gain_O=weighted_sum([update.gain_O for update in updates], weights),
        bias_O=weighted_sum([update.bias_O for update in updates], weights),
    )
    if total >= min(num_out, num_in):
        return CutSum(*_compressed(summed, a_SI, b_OS, rank), None)
    with one_blas_thread(_products(total, num_out, num_in) < LARGE):
        grams = a_SI @ a_SI.T, b_OS.T @ b_OS
    cut = _compressed(summed, a_SI, b_OS, rank, grams)
    return CutSum(*cut, summed_by_owner(grams[0] * grams[1], [update.rank for update in updates]))


def summed_by_owner(product_SS: Array, ranks: Sequence[int]) -> Array:
    """Sum each block (rows of one update, columns of another) of an (S, S) matrix, as (E, E); `ranks` has block sizes."""
    present = [place for place, rank in enumerate(ranks) if rank]
    starts = [sum(ranks[:place]) for place in present]
    # sums from each start to the next, so that updates of no rows have no place in it
    if present:
        product_SS = np.add.reduceat(np.add.reduceat(product_SS, starts, axis=0), starts, axis=1)
    return product_SS if len(present) == len(ranks) else among(product_SS, present, len(ranks))


def among(values_PP: Array, places: Sequence[int], size: int) -> Array:
    """Return a matrix (size, size) of zeros, with `values_PP` in the rows and columns that `places` numbers."""
    matrix: Array = np.zeros((size, size), dtype=values_PP.dtype)
    matrix[np.ix_(places, places)] = values_PP
    return matrix


def truncated(a_SI: Array, b_OS: Array, rank: int, grams: tuple[Array, Array] | None = None) -> Triplets:
    """Return (a_RI, b_OR, error) of the best approximation of b a; `rank` is at most the smallest of O, S and I.

    `grams` are a a^T and b^T b if they are known already; they are not changed.
    """
    num_out, num_in = b_OS.shape[0], a_SI.shape[1]
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
    """Return `truncated`, computed from Gram matrices; None where their rounding could be seen."""
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
    """Return `truncated` of a dense matrix with O <= I; None if its Gram matrix is too inexact for that."""
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


def weighted_sum(parts: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Return the sum of w_e part_e over the parts that are not None, fp32; None if all are."""
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
