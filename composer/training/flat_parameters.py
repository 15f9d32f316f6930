"""Many small parameters in one memory, so that a step of their optimiser is a few operations and not a few for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FlatParameters:
    """Moves parameters, and gradients for them, into one vector for each dtype; all keep their shapes, strides and identity.

    `vectors` are what an optimiser is given. A parameter that gets no gradient has one of zeros.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.vectors: list[Tensor] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            self.vectors.append(_gathered([parameter for parameter in parameters if parameter.dtype == dtype]))

    def zero_grad(self) -> None:
        """Gradients stay where they are, as zeros."""
        for vector in self.vectors:
            if vector.grad is not None:
                vector.grad.zero_()


def _gathered(parameters: Sequence[Tensor]) -> Tensor:
    vector = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    vector.grad = torch.zeros_like(vector)
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            place = _like(parameter, vector, start)
            place.copy_(parameter)
            parameter.data = place
            parameter.grad = _like(parameter, vector.grad, start)
            start += parameter.numel()
    return vector.requires_grad_()


def _like(parameter: Tensor, vector: Tensor, start: int) -> Tensor:
    """The part of the vector from `start` on, with the parameter's shape, and its strides where it has no gaps."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return vector.as_strided(parameter.shape, strides, start)
