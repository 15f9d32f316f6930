"""DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): clipped updates, noise added by the server, and their guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loraweave.extend.training import seeded
from loraweave.extensions.federated.strategies._privacy import PrivateStrategy, length
from loraweave.extensions.federated.strategies._strategy import Course, Order, Tensors, Trained


@dataclass(frozen=True, kw_only=True)
class DpFedavg(PrivateStrategy):
    """(epsilon, delta)-differential privacy for a client's whole data, spent over all rounds together.

    Every round draws each of the N clients with probability q (`participation`). A client whose a and b moved by d_k sends
    u_k = d_k min(1, clip / |d_k|), the norm being over all layers; the server adds (sum of u_k + sigma clip z) / (q N) to a
    and b, z standard normal, with the same weight for every client, whose sizes are data too. sigma is the least noise whose
    epsilon after all rounds, by the Renyi accountant of opacus, is at most `epsilon`; the report has what was spent.

    The server is trusted, and its noise is once for all clients; with `dp_lora` each client adds its own. The guarantee is
    for the adapter and its card; reports of the rounds and the seed, from which noise and draws follow, are not for others.
    Raises PackageMissing without opacus, TrainingError for an epsilon that no noise reaches.
    """

    sampling: ClassVar[Literal["count", "poisson"]] = "poisson"

    def train(self, course: Course, order: Order) -> Trained:
        trained = super().train(course, order)
        moved = {name: value - order.received[name] for name, value in trained.update.items()}
        factor = self._factor(moved)
        return Trained({name: value * factor for name, value in moved.items()}, {}, trained.losses)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        """Return the state plus the noisy sum of the updates, each first shortened to `clip`; `updates` may be empty."""
        sigma, expected = self.noise(course), course.sample_rate * len(course.clients)
        generator = seeded(course.settings.seed, "noise", number)
        factors = [self._factor(update) for update in updates.values()]
        state: Tensors = {}
        for name, value in server.items():
            summed = sigma * self.clip * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for factor, update in zip(factors, updates.values(), strict=True):
                summed += factor * update[name].double()
            state[name] = (value.double() + summed / expected).float()
        return state

    def _factor(self, update: Tensors) -> float:
        """Return the factor that shortens an update to `clip`, the same to the bit for any order of the tensors."""
        return min(1.0, self.clip / max(length(value for _, value in sorted(update.items())), 1e-30))
