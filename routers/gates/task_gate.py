"""A gate that looks at the task of each row alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.errors import ScopeError
from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing


class TaskGate(Gate):
    """w = softmax(g e_task) with an embedding e_KD of each of K tasks and g_ED; in fp32 or better."""

    static = True

    def __init__(self, num_tasks: int, num_features: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.e_KD = nn.Parameter(torch.empty(num_tasks, num_features))
        self.g_ED = nn.Parameter(torch.empty(num_experts, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """e_KD normal, g_ED uniform between -1/sqrt(D) and 1/sqrt(D), as torch draws an embedding and a linear layer."""
        bound = self.g_ED.shape[1] ** -0.5
        self.e_KD.normal_(generator=generator)
        self.g_ED.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        """Raises ScopeError for a call whose tasks are not known."""
        if call.task_B is None:
            raise ScopeError(
                "the gate looks at the task of each row, and this call has none: give task=..., one for each row"
            )
        scores_B1E = (self.e_KD[call.task_B] @ self.g_ED.T)[:, None]
        return Weighing(scores_B1E.softmax(dim=-1), scores_B1E)
