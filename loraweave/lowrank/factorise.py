"""Factors of a dense update: exact, or the best approximation of a given rank or error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from loraweave.common.process import one_blas_thread

Array = NDArray[Any]

# below, a whole eigen-decomposition costs less than a part of it
PARTIAL_FROM = 80
# entries of a block that is converted to float64: small enough for a core's own cache
BLOCK = 2**16
# up to this side a Gram matrix costs less than a search of the subspace, and one BLAS thread is best
SMALL_SIDE = 1024
# how much the error may be above that of the best approximation, relative to it; below the second value both are equal
EXCESS, NO_ERROR = 1e-6, 5e-7
# shares of the energy: a smaller rest is the difference of numbers too close in fp32, and in float64
REST_FP32, REST_FP64 = 1e-2, 1e-7
# what fp32 may get wrong of an eigenvalue, as a share of the largest
SLACK = 1e-6
# exponent of two, for the largest entry
MOST_EXPONENT = 24
# a block reads the matrix once for all its columns; wider ones need more products in all
WIDTH = 32
# the residual of the last look, relative to the largest eigenvalue, at which fp32 has no more to give
FLOOR = 2e-6
# products of a search by a filter: more take as long as half an eigen-decomposition; of one polynomial: fp32 holds no more
MOST_PRODUCTS, MOST_DEGREE = 32, 12
# where a filter's lower part ends at the least, relative to the largest eigenvalue, for the same reason
SMALLEST_EDGE = 1e-2
# smallest sine in columns that a Cholesky decomposition makes orthonormal: its loss of float64 is then below fp32
SMALLEST_SINE = 1e-4
# the least that is divided by
TINY = 1e-300


def factorise(delta_OI: Tensor, *, rank: int | None = None, max_error: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """Return (a_RI, b_OR, error): factors with b a = delta, fp32, and their relative Frobenius error, 0 to 1.

    With `rank`, the best approximation of at most that rank (Eckart-Young). With `max_error` above 0, the smallest rank
    whose relative error is at most that (and at most `rank` where both are given, which wins). With neither, b a is delta in
    fp32, bit for bit: one factor is the identity. A delta of zeros gives factors of rank 0.

    The error is at most 1e-6 of itself, or 5e-7, above that of the best approximation: a result in fp32 is checked against a
    bound, and computed again in float64 where the bound does not show this. The largest entry of each column of b is
    positive. Takes the memory of the Gram matrix of the smaller side, at sides above 1,024 usually a small part of that.
    """
    num_out, num_in = delta_OI.shape
    values = delta_OI.detach().cpu().float()
    dense = _Dense(values.numpy())
    if dense.energy == 0.0:
        return values.new_zeros(0, num_in), values.new_zeros(num_out, 0), 0.0
    side = min(num_out, num_in)
    if (rank is None or rank >= side) and max_error <= 0.0:
        if num_out <= num_in:
            return values, torch.eye(num_out), 0.0
        return torch.eye(num_in), values, 0.0
    exponent = 0
    # between these the largest entry needs no look
    if not values.numel() * 4.0**-MOST_EXPONENT <= dense.energy <= 4.0**MOST_EXPONENT:
        # a power of two takes nothing from any entry, and keeps squares within what fp32 holds
        exponent = math.frexp(float(values.abs().max()))[1]
        dense = _Dense(torch.ldexp(values, torch.tensor(-exponent)).numpy())
    with one_blas_thread(side <= SMALL_SIDE):
        if max_error > 0.0:
            a_RI, b_OR, error = _within_error(dense, side if rank is None else rank, max_error)
        else:
            assert rank is not None
            a_RI, b_OR, error = dense.factors(*dense.best(rank), rank)
    sign_R = column_signs(b_OR)
    b_OR = b_OR * np.ldexp(sign_R, exponent)
    return torch.from_numpy(a_RI * sign_R[:, None]).float(), torch.from_numpy(b_OR).float(), error


def _within_error(dense: _Dense, rank: int, max_error: float) -> tuple[Array, Array, float]:
    """Return the factors of the smallest rank within the error, or of `rank`, trying twice as many values each time."""
    most = min(dense.side, rank)
    tried = min(most, 16)
    while True:
        u_NR, sigma_R, v_MR = dense.best(tried)
        rest_R = dense.rest(u_NR, sigma_R, v_MR) + np.append(np.cumsum(np.square(sigma_R)[:0:-1])[::-1], 0.0)
        within = np.flatnonzero(rest_R <= max_error**2 * dense.energy)
        if len(within) or tried == most:
            return dense.factors(u_NR, sigma_R, v_MR, int(within[0]) + 1 if len(within) else most)
        tried = min(most, 2 * tried)


class _Dense:
    """A matrix seen from its smaller side N (the other is M): products with it, in fp32, or float64 block by block."""

    def __init__(self, delta_OI: Array) -> None:
        self.delta_OI = delta_OI
        self.wide = delta_OI.shape[0] <= delta_OI.shape[1]
        self.side = min(delta_OI.shape)
        self.energy = sum(float(np.vdot(block, block)) for _, block in self.blocks())

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of whole rows, with their slice, in float64."""
        rows = max(1, BLOCK // max(1, self.delta_OI.shape[1]))
        for start in range(0, len(self.delta_OI), rows):
            yield slice(start, start + rows), self.delta_OI[start : start + rows].astype(np.float64)

    def times(self, x: Array, *, to_large: bool) -> Array:
        """Return delta x or delta^T x, from the smaller side N to the larger M or back, in the precision of x."""
        turned = to_large == self.wide
        if x.dtype == np.float32:
            return (self.delta_OI.T if turned else self.delta_OI) @ x
        if not turned:
            return np.concatenate([block @ x for _, block in self.blocks()])
        total_IR = np.zeros((self.delta_OI.shape[1], x.shape[1]))
        for rows, block in self.blocks():
            total_IR += block.T @ x[rows]
        return total_IR

    def gram(self, kind: Any) -> Array:
        """Return the N x N Gram matrix in fp32 or float64."""
        if kind == np.float32:
            return self.delta_OI @ self.delta_OI.T if self.wide else self.delta_OI.T @ self.delta_OI
        gram_NN = np.zeros((self.side, self.side))
        # blocks of the larger side, so that their Gram matrices add up
        large_MN = self.delta_OI.T if self.wide else self.delta_OI
        rows = max(self.side // 2, 64)
        for start in range(0, len(large_MN), rows):
            block = large_MN[start : start + rows].astype(np.float64)
            gram_NN += block.T @ block
        return gram_NN

    def best(self, rank: int) -> tuple[Array, Array, Array]:
        """Return (u_NR, sigma_R, v_MR): the largest singular values, falling, with their vectors."""
        if 4 * rank <= self.side:
            triplets = self._in_fp32(rank)
            if triplets is not None:
                return triplets
        _, start_NR = top_eigenpairs(self.gram(np.float64).T, rank)
        return self._refined(start_NR)

    def rest(self, u_NR: Array, sigma_R: Array, v_MR: Array) -> float:
        """Return the squared Frobenius norm of delta minus its approximation by these singular triplets."""
        left = self.energy - float(np.square(sigma_R).sum())
        if left > REST_FP64 * self.energy:
            return left
        b_OR, a_RI = (u_NR * sigma_R, v_MR.T) if self.wide else (v_MR * sigma_R, u_NR.T)
        return sum(float(np.vdot(missed := block - b_OR[rows] @ a_RI, missed)) for rows, block in self.blocks())

    def factors(self, u_NR: Array, sigma_R: Array, v_MR: Array, rank: int) -> tuple[Array, Array, float]:
        u_NR, sigma_R, v_MR = u_NR[:, :rank], sigma_R[:rank], v_MR[:, :rank]
        root_R = np.sqrt(sigma_R)
        left, right = (u_NR, v_MR) if self.wide else (v_MR, u_NR)
        error = (self.rest(u_NR, sigma_R, v_MR) / self.energy) ** 0.5
        return (right * root_R).T, left * root_R, min(error, 1.0)

    def _in_fp32(self, rank: int) -> tuple[Array, Array, Array] | None:
        """Return `best` from products in fp32, or None unless a bound shows that its error is the best possible."""
        if self.side <= SMALL_SIDE:
            gram_NN = self.gram(np.float32)
            subspace = filtered_subspace(gram_NN, rank, energy=self.energy)
            if subspace is None:
                # one more than wanted says how far the rest is away
                energy_R, vectors_NR = top_eigenpairs(gram_NN.T, rank + 1)
                subspace = vectors_NR[:, :rank], float(energy_R[rank])
        else:
            subspace = top_subspace(
                lambda x_NR: self.times(self.times(x_NR, to_large=True), to_large=False), self.side, rank, energy=self.energy
            )
        if subspace is None:
            return None
        start_NR, next_energy = subspace
        u_NR, sigma_R, v_MR = self._refined(start_NR)
        left = self.energy - float(np.square(sigma_R).sum())
        if left < REST_FP32 * self.energy:
            u_NR, sigma_R, v_MR = self._refined(u_NR.astype(np.float64))
            left = self.rest(u_NR, sigma_R, v_MR)
        residual_MR = (self.times(u_NR, to_large=True) - v_MR * sigma_R) * sigma_R
        gap = float(sigma_R[-1]) ** 2 - next_energy - SLACK * float(sigma_R[0]) ** 2
        missed = energy_missed(float(np.linalg.norm(residual_MR)), gap, rank)
        return (u_NR, sigma_R, v_MR) if missed <= max(2 * EXCESS * left, NO_ERROR**2 * self.energy) else None

    def _refined(self, start_NR: Array) -> tuple[Array, Array, Array]:
        """Return delta's (u, sigma, v) on the span of delta^T start_NR: one power iteration closer to the largest."""
        basis_MR = _orthonormal(self.times(start_NR, to_large=True))
        u_NR, sigma_R, turn_RR = np.linalg.svd(self.times(basis_MR, to_large=False), full_matrices=False)
        return u_NR, sigma_R, basis_MR @ turn_RR.T


def filtered_subspace(
    gram_NN: Array, rank: int, *, energy: float, excess: float = 1e-6, most: int = MOST_PRODUCTS
) -> tuple[Array, float] | None:
    """Return (vectors_NR, next value) as `top_subspace`, for a small positive matrix in fp32; None beyond `most` products.

    A block of vectors goes through a Chebyshev polynomial that is small on the lower part of the spectrum, which ends
    where the block's Ritz values say (Zhou, Saad, Tiago and Chelikowsky 2006).
    """
    width = min(max(WIDTH, 2 * rank), len(gram_NN))
    if 2 * width > len(gram_NN):
        return None
    x_NW, products = gram_NN @ (gram_NN @ _start(len(gram_NN), width)), 3
    while True:
        x_NW = _orthonormal(x_NW / np.abs(x_NW).max(axis=0))
        image_NW = gram_NN @ x_NW
        values_W, turn_WW = np.linalg.eigh((x_NW.T @ image_NW).astype(np.float64))
        values_W, turn_WW = values_W[::-1], turn_WW[:, ::-1].astype(np.float32)
        x_NW, image_NW = x_NW @ turn_WW, image_NW @ turn_WW
        residual = float(np.linalg.norm(image_NW[:, :rank] - x_NW[:, :rank] * values_W[:rank].astype(np.float32)))
        floor, gap = FLOOR * float(values_W[0]), float(values_W[rank - 1] - values_W[rank])
        left = excess * (energy - float(values_W[:rank].sum()))
        if energy_missed(residual, gap, rank) <= left or residual <= floor:
            return x_NW[:, :rank], float(values_W[rank])
        # the residual at which that holds, and the degree that should take it there
        wanted = max(floor, math.sqrt(max(left, 0.0) * max(gap, left / rank) / (2 * rank)))
        edge = max(float(values_W[(rank + width) // 2]), SMALLEST_EDGE * float(values_W[0]))
        growth = math.acosh(max(2 * float(values_W[rank - 1]) / edge - 1, 1.0))
        if growth * (most - products) < math.log(residual / wanted):
            return None
        degree = min(max(2, math.ceil(math.log(residual / wanted) / growth)), MOST_DEGREE)
        products += degree
        before_NW, x_NW = x_NW, image_NW * np.float32(2 / edge) - x_NW
        for _ in range(degree - 1):
            before_NW, x_NW = x_NW, gram_NN @ (x_NW * np.float32(4 / edge)) - 2 * x_NW - before_NW


def _orthonormal(x_NW: Array) -> Array:
    """Return an orthonormal basis of the columns: of fp32 columns by Cholesky in float64, in a quarter of QR's time."""
    basis_NW = x_NW
    # what one decomposition leaves of nearly dependent columns, another makes orthonormal
    for _ in range(2 if x_NW.dtype == np.float32 else 0):
        wide_NW = basis_NW.astype(np.float64)
        gram_WW = wide_NW.T @ wide_NW
        lower_WW, failed = lapack.dpotrf(gram_WW, lower=1, clean=1)
        if failed:
            break
        basis_NW = np.asarray(wide_NW @ lapack.dtrtri(lower_WW, lower=1)[0].T, dtype=np.float32)
        # the sines of the angles between each column and those before it
        if bool((lower_WW.diagonal() >= SMALLEST_SINE * np.sqrt(gram_WW.diagonal())).all()):
            return basis_NW
    return np.asarray(np.linalg.qr(x_NW)[0])


@lru_cache(maxsize=4)
def _start(size: int, width: int) -> Array:
    """Return fixed pseudo-random columns (size, width), so that a search gives the same result every time."""
    return np.random.Generator(np.random.Philox(key=0)).standard_normal((size, width), dtype=np.float32)


def top_subspace(
    product: Callable[[Array], Array], size: int, rank: int, *, energy: float, excess: float = 5e-7
) -> tuple[Array, float] | None:
    """Return (vectors_NR, next value): the `rank` largest eigenvectors of a positive matrix, its next eigenvalue; fp32.

    Block Lanczos for a large matrix that is known by its products: `product` multiplies columns (N, W) by the matrix,
    whose trace is `energy`. Stops when what the values can still gain is within `excess` of the rest of the trace; None
    when a subspace of half of `size` is not enough.
    """
    width = min(max(WIDTH, rank + 8), size)
    block_NW, _ = np.linalg.qr(_start(size, width))
    most = size // 2 // width
    if most * width <= rank + 1:
        return None
    basis_ND = np.empty((size, (most + 1) * width), np.float32, order="F")
    core_DD = np.zeros((most * width, most * width))
    look = 2
    for step in range(most):
        low, high = step * width, (step + 1) * width
        basis_ND[:, low:high] = block_NW
        next_NW = product(block_NW)
        known_ND = basis_ND[:, :high]
        overlap_DW = np.zeros((high, width))
        # twice, since once leaves the rounding of what was taken away
        for _ in range(2):
            part_DW = known_ND.T @ next_NW
            next_NW = next_NW - known_ND @ part_DW
            overlap_DW += part_DW
        block_NW, couple_WW = np.linalg.qr(next_NW)
        # columns that were rounding alone, as where the matrix has no more rank, are along the basis when made unit
        block_NW, _ = np.linalg.qr(block_NW - known_ND @ (known_ND.T @ block_NW))
        core_DD[:high, low:high] = overlap_DW
        core_DD[low:high, :high] = overlap_DW.T
        if high <= rank + 1 or step + 1 < min(look, most):
            continue
        look = step + 1 + max(2, (step + 1) // 4)
        values_R, vectors_DR = top_eigenpairs(np.array(core_DD[:high, :high], order="F"), rank + 1)
        residual = float(np.linalg.norm(couple_WW.astype(np.float64) @ vectors_DR[low:high, :rank]))
        gap = float(values_R[rank - 1] - values_R[rank])
        missed = energy_missed(residual, gap, rank)
        if missed <= excess * (energy - float(values_R[:rank].sum())) or residual <= FLOOR * float(values_R[0]):
            return known_ND @ vectors_DR[:, :rank].astype(np.float32), float(values_R[rank])
    return None


def energy_missed(residual: float, gap: float, rank: int) -> float:
    """Bound the sum by which `rank` Ritz values of a symmetric matrix fall short of its largest eigenvalues.

    `residual` is the Frobenius norm of M V - V diag(values), `gap` the distance from the smallest value to the largest
    eigenvalue on the complement of V; each eigenvalue is within 2 r^2 / (gap + sqrt(gap^2 + 4 r^2)) of its Ritz value
    (Li and Li 2005), which is r itself without a gap.
    """
    gap = max(gap, 0.0)
    return rank * 2 * residual * residual / max(gap + math.sqrt(gap * gap + 4 * residual * residual), TINY)


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
