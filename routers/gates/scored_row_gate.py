"""The form of gates of a site that score experts by the mean of a row's prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Weighing
from loraweave.routers.gates.row_gate import RowGate


class ScoredRowGate(RowGate):
    """scores = r mean(x) with r_EI, of which `weights` makes w_B1E."""

    def __init__(self, num_inputs: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EI uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        bound = self.r_EI.shape[1] ** -0.5
        self.r_EI.uniform_(-bound, bound, generator=generator)

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        scores_B1E = (mean_BI.to(self.r_EI.dtype) @ self.r_EI.T)[:, None]
        return Weighing(self.weights(scores_B1E, call), scores_B1E)

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        """w_B1E."""
        raise NotImplementedError
