"""Directions of updates: two experts on a great circle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave.composer.merge.methods._span import shares
from loraweave.composer.merge.methods._terms import Weights
from loraweave.errors import WeightingError


def pair(weights: Weights) -> list[float]:
    """The weights over their sum, where two at most are not zero. Raises WeightingError for more, or a negative one."""
    count = sum(weight != 0.0 for weight in weights)
    if count > 2:
        raise WeightingError(
            f"the method interpolates between two experts and got {count}: merge two at a time, or use karcher, which takes "
            "any number"
        )
    return shares(weights)


def interpolation(inner_EE: Tensor, parts: Sequence[float], *, max_cosine: float) -> Tensor:
    """The coefficients of spherical interpolation, of shape (2,) or (2, O) for inner products (2, 2) or (2, 2, O), float64.

    `parts` are the shares 1 - t and t. Where |cos| is above `max_cosine` or a norm is zero the coefficients are those.
    """
    norm_E = torch.stack([inner_EE[0, 0], inner_EE[1, 1]]).clamp(min=0.0).sqrt()
    scale = norm_E[0] * norm_E[1]
    cosine = torch.where(scale > 0.0, inner_EE[0, 1] / torch.where(scale > 0.0, scale, 1.0), 1.0).clamp(-1.0, 1.0)
    straight = (cosine.abs() > max_cosine) | (cosine.abs() == 1.0)
    angle = torch.where(straight, 1.0, cosine.acos())
    rows = [torch.where(straight, part, (part * angle).sin() / angle.sin()) for part in parts]
    return torch.stack(rows)
