"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): one frozen random a for all, so that the mean of b is the mean update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loraweave.extend import LoraJob
from loraweave.extensions.federated.strategies._strategy import (
    B,
    Course,
    Layers,
    Order,
    Strategy,
    Tensors,
    Trained,
    factors_of,
    learn,
    new_layers,
    start_of,
    tensors_of,
)


@dataclass(frozen=True, kw_only=True)
class Ffa(Strategy):
    """b = sum of n_k b_k over sum of n_k. Only b is exchanged: every client makes the same a from the seed."""

    def first(self, course: Course) -> Tensors:
        return _only_b(super().first(course))

    def train(self, course: Course, order: Order) -> Trained:
        job = LoraJob(order.client, start_of(course, tensors_of(self.layers(course, order.received))), course.scale)
        job.freeze_a()
        losses = learn(course, order, job)
        return Trained(_only_b(factors_of(job)), {}, losses)

    def layers(self, course: Course, state: Tensors) -> Layers:
        return {layer: replace(factors, b_OR=state[layer + B]) for layer, factors in new_layers(course).items()}


def _only_b(state: Tensors) -> Tensors:
    return {name: value for name, value in state.items() if name.endswith(B)}
