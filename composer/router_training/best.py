"""The best parameters of a training so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Best:
    """The parameters with the lowest held-out loss, and how many evaluations were no better since."""

    loss: float = math.inf
    values: Sequence[Tensor] = ()
    waited: int = 0


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Their values now."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Gives the parameters these values."""
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
