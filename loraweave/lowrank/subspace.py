"""The dominant eigenvectors of a large symmetric matrix that is known by its products: block Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraweave.lowrank.truncation import top_eigenpairs

Array = NDArray[Any]

# a block reads the matrix once for all its columns; wider ones need more products in all
WIDTH = 32
# the residual of the last look, relative to the largest eigenvalue, at which fp32 has no more to give
FLOOR = 2e-6
# the least that is divided by
TINY = 1e-300


def top_subspace(
    product: Callable[[Array], Array], size: int, rank: int, *, energy: float, excess: float = 5e-7
) -> tuple[Array, float] | None:
    """(vectors_NR, next value): the `rank` largest eigenvectors of a positive matrix, and its next eigenvalue, in fp32.

    `product` multiplies columns (N, W) by the matrix, whose trace is `energy`. Stops when what the values can still gain is
    within `excess` of the rest of the trace; None when a subspace of half of `size` is not enough. Starts from fixed
    pseudo-random columns, so that it gives the same every time.
    """
    width = min(max(WIDTH, rank + 8), size)
    start_NW = np.random.Generator(np.random.Philox(key=0)).standard_normal((size, width), dtype=np.float32)
    block_NW, _ = np.linalg.qr(start_NW)
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
    """The most by which `rank` Ritz values of a symmetric matrix fall short of its largest eigenvalues, in sum.

    `residual` is the Frobenius norm of M V - V diag(values), `gap` the distance from the smallest value to the largest
    eigenvalue on the complement of V; each eigenvalue is within 2 r^2 / (gap + sqrt(gap^2 + 4 r^2)) of its Ritz value
    (Li and Li 2005), which is r itself without a gap.
    """
    gap = max(gap, 0.0)
    return rank * 2 * residual * residual / max(gap + math.sqrt(gap * gap + 4 * residual * residual), TINY)
