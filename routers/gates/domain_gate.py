"""A gate of each site that learns from which domain a row is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.scored_row_gate import ScoredRowGate
from loraweave.routers.routing.choosing import best_of


class DomainGate(ScoredRowGate):
    """w = 1 for the expert with the highest r mean(x), 0 for the others, with the gradient of softmax(r mean(x)); r_EI.

    With `oracle` a row whose domain the call knows has the expert of that place instead.
    """

    def __init__(self, num_inputs: int, num_experts: int, *, oracle: bool = False) -> None:
        super().__init__(num_inputs, num_experts)
        self.oracle = oracle

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        w_B1E = best_of(scores_B1E, scores_B1E.softmax(dim=-1))
        if self.oracle and call.task_B is not None:
            own_B1E = nn.functional.one_hot(call.task_B.clamp(min=0), self.num_experts).to(w_B1E)[:, None]
            w_B1E = torch.where((call.task_B >= 0)[:, None, None], own_B1E, w_B1E)
        return w_B1E
