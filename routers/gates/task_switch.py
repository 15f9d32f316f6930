"""A gate that looks at each row's task alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import UNKNOWN, Call
from loraweave.routers.gates.gate import Gate, Weighing


class TaskSwitch(Gate):
    """w_e = scale_e for the experts of the row's task, and 0 for the others.

    `used` has, for each task and at last for rows without one, which experts count. With `learned` the scales learn.
    """

    static = True
    used_KE: Tensor
    scale_E: Tensor

    def __init__(self, used: Sequence[Sequence[bool]], scales: Sequence[float], *, learned: bool = False) -> None:
        super().__init__(len(scales), most=max(sum(row) for row in used))
        self.register_buffer("used_KE", torch.tensor(used), persistent=False)
        if learned:
            self.scale_E = nn.Parameter(torch.tensor(scales))
        else:
            self.register_buffer("scale_E", torch.tensor(scales), persistent=False)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        # UNKNOWN is -1, the last one
        used_BE = self.used_KE[UNKNOWN:] if call.task_B is None else self.used_KE[call.task_B]
        return Weighing((used_BE * self.scale_E)[:, None])
