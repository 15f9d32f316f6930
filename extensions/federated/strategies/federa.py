"""FeDeRA (Yan et al. 2024, arXiv 2404.18848): a LoRA that begins with the weight's largest singular values and vectors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraweave import Factors
from loraweave.extend import algebra, factorise
from loraweave.extend.models import base_layer
from loraweave.extend.training import LoraJob, LowRank
from loraweave.extensions.federated.strategies._strategy import (
    Course,
    Layers,
    Order,
    Pairs,
    Strategy,
    Tensors,
    layers_of,
    start_of,
    tensors_of,
)

ORIGIN = "origin/"


@dataclass(frozen=True, kw_only=True)
class Federa(Strategy):
    """W = U Sigma V^T: b0 = U_r Sigma_r^1/2, a0 = Sigma_r^1/2 V_r^T, and what learns is b a beside the frozen W - b0 a0.

    a and b are averaged apart by the clients' sizes (FedAvg). The result is b a - b0 a0, an adapter of twice the rank on the
    base as it is. The server sends a0 and b0 along, which a client could make from its base as well.
    """

    def first(self, course: Course) -> Tensors:
        """Return each layer's a0 and b0, from its weight's SVD. AdapterUnsupported unless it is a plain float matrix."""
        modules = dict(course.model.named_modules())
        weights = {layer: base_layer(modules, layer, "strategy 'federa'").weight_OI for layer in course.layers}
        cuts = {layer: factorise(weight_OI.float(), rank=course.rank) for layer, weight_OI in weights.items()}
        origin = tensors_of({layer: Factors(a_RI, b_OR) for layer, (a_RI, b_OR, _) in cuts.items()})
        return origin | {ORIGIN + name: value for name, value in origin.items()}

    def job(self, course: Course, order: Order) -> LoraJob:
        learned, origin = (start_of(course, part) for part in _apart(order.received))
        return ResidualJob(order.client, learned, course.scale, origin)

    def expected(self, received: Tensors, update: Tensors) -> Mapping[str, tuple[int, ...]]:
        return super().expected(_apart(received)[0], update)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        return server | super().aggregate(course, server, updates, number)

    def layers(self, course: Course, state: Tensors) -> Layers:
        learned, origin = map(layers_of, _apart(state))
        return {layer: algebra.add([learned[layer], algebra.negate(origin[layer])]) for layer in learned}


class ResidualJob(LoraJob):
    """The job of a LoRA b a beside W - b0 a0: its update is b a - b0 a0, and only a and b learn."""

    def __init__(self, name: str, factors: Pairs, scale: float, origin: Pairs) -> None:
        super().__init__(name, factors, scale)
        self._origin = origin

    def low_rank(self, layer: str) -> LowRank:
        a_RI, b_OR, scale = super().low_rank(layer)
        a0_RI, b0_OR = self._origin[layer]
        return LowRank(torch.cat([a_RI, a0_RI]), torch.cat([b_OR, -b0_OR], dim=1), scale)


def _apart(state: Tensors) -> tuple[Tensors, Tensors]:
    """Return (the tensors that learn, their starting values under the same names)."""
    origin = {name.removeprefix(ORIGIN): value for name, value in state.items() if name.startswith(ORIGIN)}
    return {name: value for name, value in state.items() if not name.startswith(ORIGIN)}, origin
