"""Gradient descent for everything that learns: learning rates, the optimizer, and the checks of a step.

Adapters, continual training, routers, experts, encoders and reward heads bring parameters and losses; all take steps here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from rich.progress import Progress
from torch import Tensor, nn

from loraweave.errors import TrainingError

GRADIENT_LIMIT = 1.0


def warmed_cosine(highest: float, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of a step, from 0: linear warm-up to `highest` in `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Descent:
    """An AdamW optimizer at the rates `rate(step)`, with gradients clipped to the norm `limit` (None: not clipped).

    `fused` makes one pass over the parameters and rounds differently.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        rate: Callable[[int], float],
        *,
        limit: float | None = GRADIENT_LIMIT,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate(0), weight_decay=weight_decay, fused=fused or None)
        self._rate, self._limit = rate, limit

    def step(self, number: int) -> None:
        """Take the step of this number, from 0, and keep the gradients."""
        if self._limit is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(number)
        self.optimizer.step()


def descend(
    learners: Mapping[str, Descent],
    losses: Callable[[int], Tensor],
    steps: int,
    bar: Progress,
    *,
    title: str,
    first: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Take the steps from `first` on, each along the gradient of `losses(step)`: one loss for each learner, in their order.

    A loss depends on the parameters of its own learner alone. Raises TrainingError for one that is not finite.
    """
    shown = bar.add_task(title, total=steps, completed=first, loss="")
    for step in range(first, steps):
        loss_J = losses(step).reshape(-1)
        backward(loss_J, dict.fromkeys(learners, step))
        for descent in learners.values():
            descent.step(step)
            descent.optimizer.zero_grad()
        if after_step is not None:
            after_step(step)
        bar.update(shown, advance=1, loss=f"loss {float(loss_J.detach().mean()):.3f}")


def backward(loss_J: Tensor, steps: Mapping[str, int], *, whole_J: Tensor | None = None) -> list[float]:
    """Add the gradients of the losses and return the losses as numbers. `steps` has each learner's step, from 0.

    Where the losses are parts, `whole_J` has what they are parts of, which is returned.
    Raises TrainingError for a loss that is not finite, before any gradient changes.
    """
    losses: list[float] = (loss_J if whole_J is None else whole_J).tolist()
    for (name, step), loss in zip(steps.items(), losses, strict=True):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of {name} is {loss} at step {step + 1}; lower lr, or look for damaged examples")
    loss_J.sum().backward()  # type: ignore[no-untyped-call]
    return losses


class FlatParameters:
    """Parameters and their gradients, moved into one vector for each dtype; all keep their shapes, strides and identity.

    Pass `vectors` to an optimiser. A parameter without a gradient has one of zeros.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.vectors: list[Tensor] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            self.vectors.append(_gathered([parameter for parameter in parameters if parameter.dtype == dtype]))

    def zero_grad(self) -> None:
        """Set the gradients to zero in place."""
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
    """Return the vector's part from `start` on, with the parameter's shape, and its strides if it has no gaps."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return vector.as_strided(parameter.shape, strides, start)
