"""A gate of each site that learns from which domain a row is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Weighing
from loraweave.routers.gates.row_gate import RowGate
from loraweave.routers.routing.choosing import best_of


class DomainGate(RowGate):
    """w = 1 for the expert with the highest r mean(x), 0 for the others, with the gradient of softmax(r mean(x)); r_EI.

    With `oracle` a row whose domain the call knows has the expert of that place instead.
    """

    def __init__(self, num_inputs: int, num_experts: int, *, oracle: bool = False) -> None:
        super().__init__(num_experts)
        self.oracle = oracle
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EI uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        bound = self.r_EI.shape[1] ** -0.5
        self.r_EI.uniform_(-bound, bound, generator=generator)

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        scores_B1E = (mean_BI.to(self.r_EI.dtype) @ self.r_EI.T)[:, None]
        w_B1E = best_of(scores_B1E, scores_B1E.softmax(dim=-1))
        if self.oracle and call.task_B is not None:
            own_B1E = nn.functional.one_hot(call.task_B.clamp(min=0), self.num_experts).to(w_B1E)[:, None]
            w_B1E = torch.where((call.task_B >= 0)[:, None, None], own_B1E, w_B1E)
        return Weighing(w_B1E, scores_B1E)
