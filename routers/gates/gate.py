"""The form of every gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call


class Weighing(NamedTuple):
    """w_BTE, what each expert counts, where B and T are 1 if all rows or tokens share it; and the scores_BTE before softmax
    and choice, for losses, None where there are none."""

    w_BTE: Tensor
    scores_BTE: Tensor | None = None


class Gate(nn.Module):
    """Weighs the experts of one place of a model, or of several that share it.

    `most` is how many weights of a token can be other than 0. `skips` says that a weight of exactly 0 has no gradient, so
    that its expert may be left out. `static` says that the weights depend on no input: with None as x_BTI and a call of one
    task, or of none, they are the same ones.
    """

    static: bool = False
    skips: bool = False

    def __init__(self, num_experts: int, *, most: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.most = num_experts if most is None else most

    def reset(self, generator: torch.Generator) -> None:
        """Draws what the gate begins with."""

    def begin(self, call: Call) -> None:
        """Looks at a call, or at the prompts of a generation, before any layer runs."""

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Row b depends on row b alone, and on no padding."""
        raise NotImplementedError
