"""A job's steps down its gradient."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.composer.train.schedule import Pace

GRADIENT_LIMIT = 1.0


class Descent:
    """AdamW without weight decay, at the rates of a pace, down gradients that are clipped to norm 1.

    With `fused` it goes through the parameters once, and rounds otherwise.
    """

    def __init__(self, parameters: Sequence[Tensor], pace: Pace, *, fused: bool = False) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=pace.lr, weight_decay=0.0, fused=fused or None)
        self._parameters, self._pace = parameters, pace

    def step(self, number: int) -> None:
        """The step of this number, from 0. Gradients stay."""
        nn.utils.clip_grad_norm_(self._parameters, GRADIENT_LIMIT)
        for group in self.optimizer.param_groups:
            group["lr"] = self._pace.rate(number)
        self.optimizer.step()


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


@contextmanager
def caller_randomness() -> Iterator[None]:
    """Inside, the generators of Python, numpy and torch may be seeded; after it they go on where they were before."""
    python, array = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
