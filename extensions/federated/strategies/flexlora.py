"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the exact mean update, decomposed again at each client's rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from loraweave.extensions.federated.methods.flexlora import flexlora as cut_mean
from loraweave.extensions.federated.strategies._strategy import Course, Strategy, Tensors, layers_of, sizes, tensors_of


@dataclass(frozen=True, kw_only=True)
class Flexlora(Strategy):
    """D = sum of n_k b_k a_k over sum of n_k = U Sigma V^T; client k begins with b = U Sigma and a = V^T cut to its rank.

    The server keeps D at the largest rank of a client, the best approximation; clients may have different ranks.
    """

    mixed_ranks: ClassVar[bool] = True

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        clients, weights = [layers_of(update) for update in updates.values()], sizes(course, updates)
        merged = {
            layer: cut_mean([layers[layer] for layers in clients], weights, rank=course.rank) for layer in course.layers
        }
        return tensors_of({layer: update.factors for layer, update in merged.items()})
