"""A job's steps down its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraweave.composer.training.pace import Pace

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
