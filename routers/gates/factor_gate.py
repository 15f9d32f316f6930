"""A gate that scores the factors of a site by the prompt of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Weighing
from loraweave.routers.gates.row_gate import RowGate


class FactorGate(RowGate):
    """w = [softmax(r_a h), softmax(r_b h)] with h = mean(x) over a row's prompt: of E factors a, and of E factors b.

    They are scores, of which a form chooses the best. r_EI is that of the factors a, and then of b.
    """

    def __init__(self, num_inputs: int, num_factors: int, *, padding: bool = False) -> None:
        super().__init__(2 * num_factors)
        self.padding = padding
        self.r_EI = nn.Parameter(torch.empty(2 * num_factors, num_inputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EI uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        bound = self.r_EI.shape[1] ** -0.5
        self.r_EI.uniform_(-bound, bound, generator=generator)

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        scores_B1E = (mean_BI.to(self.r_EI.dtype) @ self.r_EI.T)[:, None]
        by_pool = scores_B1E.unflatten(-1, (2, -1))  # type: ignore[no-untyped-call]
        return Weighing(by_pool.softmax(dim=-1).flatten(-2), scores_B1E)
