"""A gate that looks at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing


class ConstantGate(Gate):
    """The same w_E for everything, which does not learn."""

    static = True
    w_E: Tensor

    def __init__(self, w_E: Sequence[float]) -> None:
        super().__init__(len(w_E))
        self.given = tuple(w_E)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        w_E = torch.tensor(self.given, dtype=torch.float64)
        return Weighing(
            (w_E if x_BTI is None else w_E.to(x_BTI.device, torch.promote_types(x_BTI.dtype, torch.float32)))[None, None]
        )
