"""The best parameters of a training so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Best:
    """The parameters with the lowest held-out loss, and how many evaluations were no better since."""

    loss: float = math.inf
    values: Sequence[Tensor] = ()
    waited: int = 0

    def judge(self, loss: float, parameters: Iterable[Tensor]) -> bool:
        """Whether this loss is the lowest so far, by which these parameters are the best; if not, one more has waited."""
        if not loss < self.loss:
            self.waited += 1
            return False
        self.loss, self.values, self.waited = loss, copied(parameters), 0
        return True

    @classmethod
    def again(cls, losses: Iterable[float], values: Sequence[Tensor]) -> Self:
        """What it was after these losses, whose best parameters have these values."""
        best = cls()
        for loss in losses:
            best.judge(loss, ())
        best.values = values
        return best


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Their values now."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Gives the parameters these values."""
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
