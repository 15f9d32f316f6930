"""The form of learned routers whose scores are one product of a layer's input with a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.choosing import without
from loraweave.routers.routing.layer_tensors import LayerTensors
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.members import Members


class InputGates(LearnedRouter):
    """scores = g x with a matrix g_EI for each layer, or a `shared` one for all layers of I inputs.

    `start(E, I)` makes what it begins with.
    """

    def __init__(self, pool: ExpertPool | Members, start: Callable[[int, int], Tensor], *, shared: bool = False) -> None:
        super().__init__(pool)
        self.shared = shared
        self.gates_ = LayerTensors({}, learned=True)
        for layer, routed in self.members.layers.items():
            # a layer with trained biases alone does not say how many inputs it has
            if routed.num_inputs and self.gate_of(layer) not in self.gates_:
                self.gates_[self.gate_of(layer)] = start(len(self.experts), routed.num_inputs)

    def gate_of(self, layer: str) -> str:
        """The layer whose matrix this one has: where one is shared, the first layer of as many inputs."""
        if not self.shared:
            return layer
        layers, num_inputs = self.members.layers, self.members.layers[layer].num_inputs
        return next(name for name, routed in layers.items() if routed.num_inputs == num_inputs)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """scores_BTE, -inf for experts that leave the layer alone; 0 for the others where there is no matrix."""
        if self.gate_of(layer) in self.gates_:
            g_EI = self.gates_[self.gate_of(layer)]
            scores_BTE = x_BTI.to(g_EI.dtype) @ g_EI.T
        else:
            scores_BTE = x_BTI.new_zeros(*x_BTI.shape[:2], len(self.experts), dtype=torch.float32)
        return without(scores_BTE, self.members.layers[layer].experts)


def drawn(num_experts: int, num_inputs: int) -> Tensor:
    """g_EI as torch draws a linear layer: uniform between -1/sqrt(I) and 1/sqrt(I)."""
    bound = num_inputs**-0.5
    return torch.empty(num_experts, num_inputs).uniform_(-bound, bound)
