"""A gate of each site that looks at the mean of a row's prompt."""

from __future__ import annotations

from torch import Tensor

from loraweave.routers.gates.call import Call
from loraweave.routers.gates.scored_row_gate import ScoredRowGate


class MeanGate(ScoredRowGate):
    """w = softmax(r mean(x)) with r_EI."""

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        return scores_B1E.softmax(dim=-1)
