"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): clients of different ranks, which get cut factors and may prune them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loraweave.extend import NonNegative, Range
from loraweave.extend.training import LoraJob
from loraweave.extensions.federated.methods.hetlora import hetlora as padded_sum
from loraweave.extensions.federated.methods.hetlora import survey
from loraweave.extensions.federated.strategies._strategy import (
    A,
    Client,
    Course,
    Order,
    Pairs,
    Strategy,
    Tensors,
    Trained,
    factors_of,
    layers_of,
    learn,
    start_of,
    tensors_of,
    truncated,
)

RANK = "rank"


@dataclass(frozen=True, kw_only=True)
class Hetlora(Strategy):
    """Client k gets the first r_k rows of a and columns of b, and learns with a penalty on the last of them.

    The penalty is strength * sum over layers of |b[:, s:]| |a[s:]|, s = floor(gamma r_k), in Frobenius norms. If that sum is
    smaller after the round than before it, the client drops those rows and its rank is s from then on (at least 1). The
    server pads with zeros to the largest rank and sums a and b apart with weights |D_k| / sum of |D_j| of the whole updates,
    as `lw.merge(method="hetlora")` does. A b of zeros, as in the first round, has a sum of 0, so that nothing is pruned.
    The default strength is ours. With a gamma of 0.99 one row goes at a time at usual ranks.
    """

    gamma: Annotated[float, Range(above=0, below=1)] = 0.99
    strength: NonNegative = 1e-3

    mixed_ranks: ClassVar[bool] = True

    def sent(self, course: Course, server: Tensors, client: Client, own: Tensors) -> Tensors:
        return truncated(server, int(own.get(RANK, torch.tensor(client.rank))))

    def train(self, course: Course, order: Order) -> Trained:
        rank = next(value.shape[0] for name, value in order.received.items() if name.endswith(A))
        kept = max(1, math.floor(self.gamma * rank))
        job = PruningJob(order.client, start_of(course, order.received), course.scale, kept, self.strength)
        before = float(job.tail().detach())
        losses = learn(course, order, job)
        pruned = float(job.tail().detach()) < before
        update = truncated(factors_of(job), kept if pruned else rank)
        return Trained(update, {RANK: torch.tensor(kept if pruned else rank)}, losses)

    def expected(self, received: Tensors, update: Tensors) -> Mapping[str, tuple[int, ...]]:
        """Return the received shapes, or those with the update's smaller rank if it is the same in all layers."""
        full_rank = min(value.shape[0] for name, value in received.items() if name.endswith(A))
        sent = {value.shape[0] for name, value in update.items() if name.endswith(A) and value.ndim}
        rank = sent.pop() if len(sent) == 1 else full_rank
        return super().expected(truncated(received, rank if 0 < rank < full_rank else full_rank), update)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        clients, weights = [layers_of(update) for update in updates.values()], [1.0] * len(updates)
        experts = {layer: [layers[layer] for layers in clients] for layer in course.layers}
        norms = survey(experts.values(), weights)
        return tensors_of({layer: padded_sum(factors, weights, survey=norms) for layer, factors in experts.items()})


class PruningJob(LoraJob):
    """A LoRA job with a penalty on the rank rows from `kept` on."""

    def __init__(self, name: str, factors: Pairs, scale: float, kept: int, strength: float) -> None:
        super().__init__(name, factors, scale)
        self._kept, self._strength = kept, strength

    def tail(self) -> Tensor:
        """Return the sum over layers of |b[:, s:]| |a[s:]|, with the scale in b."""
        products = [b[:, self._kept :].norm() * a[self._kept :].norm() for a, b in self.factors.values()]
        return self.scale * torch.stack(products).sum()

    def penalty(self) -> Tensor:
        return self._strength * self.tail()
