"""A gate that scores the factors of a site by the prompt of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.scored_row_gate import ScoredRowGate


class FactorGate(ScoredRowGate):
    """w = [softmax(r_a h), softmax(r_b h)] with h = mean(x) over a row's prompt: of E factors a, and of E factors b.

    They are scores, of which a form chooses the best. r_EI is that of the factors a, and then of b.
    """

    def __init__(self, num_inputs: int, num_factors: int, *, padding: bool = False) -> None:
        super().__init__(num_inputs, 2 * num_factors)
        self.padding = padding

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        of_a, of_b = scores_B1E.chunk(2, dim=-1)
        return torch.cat([of_a.softmax(dim=-1), of_b.softmax(dim=-1)], dim=-1)
