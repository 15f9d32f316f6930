"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): one frozen random a for all, so that the mean of b is the mean update."""

from dataclasses import dataclass, replace

from loraweave.extend.training import LoraJob
from loraweave.extensions.federated.strategies._strategy import (
    B,
    Course,
    Layers,
    Order,
    Strategy,
    Tensors,
    Trained,
    new_layers,
    tensors_of,
)


@dataclass(frozen=True, kw_only=True)
class Ffa(Strategy):
    """b = sum of n_k b_k over sum of n_k. Only b is exchanged: every client makes the same a from the seed."""

    def first(self, course: Course) -> Tensors:
        return _only_b(super().first(course))

    def job(self, course: Course, order: Order) -> LoraJob:
        job = super().job(course, replace(order, received=tensors_of(self.layers(course, order.received))))
        job.freeze_a()
        return job

    def train(self, course: Course, order: Order) -> Trained:
        trained = super().train(course, order)
        return replace(trained, update=_only_b(trained.update))

    def layers(self, course: Course, state: Tensors) -> Layers:
        return {layer: replace(factors, b_OR=state[layer + B]) for layer, factors in new_layers(course).items()}


def _only_b(state: Tensors) -> Tensors:
    return {name: value for name, value in state.items() if name.endswith(B)}
