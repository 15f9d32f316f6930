"""SLoRA (Babakniya et al. 2023, arXiv 2308.06522): rounds of sparse updates first, whose SVD then begins a LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave import Factors, TrainingError
from loraweave.extend import Count, Share, factorise
from loraweave.extend.training import seeded
from loraweave.extensions.federated.strategies._strategy import (
    Course,
    Layers,
    MatrixJob,
    Order,
    Strategy,
    Tensors,
    Trained,
    layers_of,
    learn,
    spread,
    tensors_of,
)

VALUES = ".values"


@dataclass(frozen=True, kw_only=True)
class Slora(Strategy):
    """A strategy of two stages, which both weigh the clients by their sizes.

    In the first `sparse_rounds` the clients train the entries of each D_OI that one random mask leaves, a share `density` of
    them (at least one), the same for all clients and drawn from the seed; their values are averaged, and nothing else is
    sent. Then D = U Sigma V^T of every layer, cut to the rank, begins the LoRA: b = U Sigma^1/2, a = Sigma^1/2 V^T. All
    further rounds are FedAvg on a and b. The base stays what it was. Raises TrainingError if no round is left for the LoRA.
    """

    sparse_rounds: Count = 1
    density: Share = 0.01

    def require(self, course: Course) -> None:
        if self.sparse_rounds >= course.rounds:
            raise TrainingError(
                f"strategy 'slora' got sparse_rounds={self.sparse_rounds} of {course.rounds} rounds in all, which leaves "
                "none for the LoRA: take more rounds, or fewer sparse ones"
            )

    def first(self, course: Course) -> Tensors:
        return {layer + VALUES: torch.zeros(len(self.places(course, layer))) for layer in course.layers}

    def places(self, course: Course, layer: str) -> Tensor:
        """Return the flat places of the entries of D_OI that are trained, in ascending order."""
        num_outputs, num_inputs = course.layers[layer]
        size = num_outputs * num_inputs
        order = torch.randperm(size, generator=seeded(course.settings.seed, "slora", layer))
        return order[: max(1, round(self.density * size))].sort().values

    def train(self, course: Course, order: Order) -> Trained:
        if layers_of(order.received):
            return super().train(course, order)
        device = next(course.model.parameters()).device
        places = {layer: self.places(course, layer).to(device) for layer in course.layers}
        values = {layer: order.received[layer + VALUES].to(device) for layer in course.layers}
        job = MatrixJob(order.client, values, course.layers, places)
        losses = learn(course, order, job)
        return Trained({layer + VALUES: value for layer, value in job.learned().items()}, {}, losses)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        state = super().aggregate(course, server, updates, number)
        return tensors_of(self.layers(course, state)) if number == self.sparse_rounds else state

    def layers(self, course: Course, state: Tensors) -> Layers:
        if not any(name.endswith(VALUES) for name in state):
            return layers_of(state)
        layers = {}
        for layer, shape in course.layers.items():
            delta_OI = spread(state[layer + VALUES], self.places(course, layer), shape)
            layers[layer] = Factors(*factorise(delta_OI, rank=course.rank)[:2])
        return layers
