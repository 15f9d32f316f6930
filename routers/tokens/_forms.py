"""Base classes of token routers: by scores, and by a learned matrix for each layer."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._members import LayerTensors, Members
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._scores import top_k_softmax, without


class ScoredRouter(TokenRouter):
    """A router with w = softmax(scores / temperature) over the `top_k` highest scores of each token; other weights are 0.

    A `top_k` of None is `default`, or all experts of a smaller pool. Raises WeightingError for a top_k above the pool.
    """

    counts: ClassVar[tuple[str, ...]] = ("top_k",)

    def __init__(self, pool: ExpertPool | Members, top_k: int | None, temperature: float, *, default: int) -> None:
        super().__init__(pool)
        self.top_k = min(default, len(self.experts)) if top_k is None else top_k
        self.temperature = temperature

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return scores_BTE in fp32 or better, -inf for experts that leave the layer alone."""
        raise NotImplementedError

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; each token's weights sum to 1."""
        return self.chosen(self.scores(x_BTI, layer))

    def chosen(self, scores_BTE: Tensor) -> Tensor:
        """Return w_BTE: softmax(scores / temperature) over each token's `top_k` highest scores, 0 elsewhere."""
        return top_k_softmax(scores_BTE, self.top_k, self.temperature)


def draw_gates(num_experts: int, num_inputs: int) -> Tensor:
    """Draw g_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I)."""
    bound = num_inputs**-0.5
    return torch.empty(num_experts, num_inputs).uniform_(-bound, bound)


class InputGates(LearnedRouter):
    """A router with scores = g x and a matrix g_EI for each layer, or a `shared` one for all layers of I inputs.

    `start(E, I)` returns an initial matrix; by default it is drawn as torch draws a linear layer.
    """

    def __init__(
        self, pool: ExpertPool | Members, start: Callable[[int, int], Tensor] = draw_gates, *, shared: bool = False
    ) -> None:
        super().__init__(pool)
        self.shared = shared
        self.gates_ = LayerTensors({}, learned=True)
        for layer, routed in self.members.layers.items():
            # a layer with trained biases alone does not say how many inputs it has
            if routed.num_inputs and self.gate_of(layer) not in self.gates_:
                self.gates_[self.gate_of(layer)] = start(len(self.experts), routed.num_inputs)

    def gate_of(self, layer: str) -> str:
        """Return the layer whose matrix this layer uses: itself, or if `shared` the first layer with as many inputs."""
        if not self.shared:
            return layer
        layers, num_inputs = self.members.layers, self.members.layers[layer].num_inputs
        return next(name for name, routed in layers.items() if routed.num_inputs == num_inputs)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return scores_BTE, -inf for experts that leave the layer alone; 0 for the layer's experts if it has no matrix."""
        if self.gate_of(layer) in self.gates_:
            g_EI = self.gates_[self.gate_of(layer)]
            scores_BTE = x_BTI.to(g_EI.dtype) @ g_EI.T
        else:
            scores_BTE = x_BTI.new_zeros(*x_BTI.shape[:2], len(self.experts), dtype=torch.float32)
        return without(scores_BTE, self.members.layers[layer].experts)
