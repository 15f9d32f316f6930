"""Bounds of rounding that hold on every processor: from the terms of a sum and the size of what is summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unit(dtype: torch.dtype = torch.float32) -> float:
    """Return the most that one rounding changes a number, in parts of it."""
    return torch.finfo(dtype).eps / 2


def rounding(terms: int, size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the most that a sum of products is off in any order, where the products' magnitudes sum up to `size`.

    Each of the `terms` products is rounded, and so is each sum (Higham, Accuracy and Stability, section 3.1).
    """
    return 2 * terms * unit(dtype) * torch.as_tensor(size, dtype=torch.float64)


def num_terms(model: nn.Module) -> int:
    """Return how many products are summed one after the other on the way through a model: each layer's inputs."""
    return sum(weight[0].numel() for weight in model.parameters() if weight.ndim > 1)


def assert_near(
    found: Tensor,
    wanted: Tensor,
    terms: int,
    size: Tensor | float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise AssertionError if two ways to calculate the same part by more than twice what each may be off.

    `size` is the sum of the magnitudes of the products; without it, the largest magnitude in `wanted`. `dtype` is what the
    sums were rounded to; without it, the coarser one of both tensors.
    """
    assert found.shape == wanted.shape
    if size is None:
        size = wanted.detach().abs().max()
    allowed = 2 * rounding(terms, size, dtype or max(found.dtype, wanted.dtype, key=unit))
    parted = (found.detach().double() - wanted.detach().double()).abs()
    assert bool((parted <= allowed).all()), f"they part by {float((parted / allowed).max()):.3g} of what rounding allows"
