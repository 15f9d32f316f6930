"""What is added to the loss of a mixture for its weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.errors import WeightingError
from loraweave.routers.lorahub import Lorahub

# its published factor of mean|w|
LORAHUB_L1 = Lorahub.l1
# an expert whose weights are all of this size or smaller is not counted
COUNTED = 0.01


@dataclass(frozen=True)
class Penalty:
    """l1 * mean|w| + l2 * mean(w^2) + sparsity * (how many experts have a weight of more than 0.01 in some layer).

    The means are over experts and, where weights differ by layer, layers. The count takes no part in gradients.
    Raises WeightingError for factors that are negative or not finite.
    """

    l1: float = LORAHUB_L1
    l2: float = 0.0
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("l2", self.l2), ("sparsity", self.sparsity)):
            if not 0 <= value < math.inf:
                raise WeightingError(f"{name} is {value!r}; the factor of a term of the loss is a finite number, 0 or more")

    def __call__(self, values_BTLE: Tensor) -> Tensor:
        """The sum of the terms, a scalar of the weights' dtype."""
        total = torch.zeros((), dtype=values_BTLE.dtype)
        if self.l1:
            total = total + self.l1 * values_BTLE.abs().mean()
        if self.l2:
            total = total + self.l2 * values_BTLE.square().mean()
        if self.sparsity:
            counted_E = (values_BTLE.detach().abs() > COUNTED).flatten(0, 2).any(dim=0)
            total = total + self.sparsity * counted_E.sum().to(values_BTLE.dtype)
        return total
