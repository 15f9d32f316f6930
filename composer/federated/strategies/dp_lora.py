"""DP-LoRA (Liu et al. 2023, arXiv 2312.17493), by clients: clipped updates, Gaussian noise, and what both guarantee."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch

from loraweave.common.options import Positive, Range
from loraweave.common.randomness import seeded
from loraweave.composer.federated.strategies._strategy import Course, Order, Strategy, Tensors, Trained
from loraweave.errors import PackageMissing, TrainingError

# of Renyi divergence; small budgets need high ones
ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), 80, 96, 128, 192, 256, 512, 1024]


@dataclass(frozen=True, kw_only=True)
class DpLora(Strategy):
    """(epsilon, delta)-differential privacy for a client's whole data, spent over all rounds together.

    Every round draws each of the N clients with probability q (`participation`). A client whose a and b moved by d_k sends
    u_k = d_k min(1, clip / |d_k|), the norm being over all layers; the server adds (sum of u_k + sigma clip z) / (q N) to a
    and b, z standard normal, with the same weight for every client, whose sizes are data too (DP-FedAvg, McMahan et al.
    2018, arXiv 1710.06963). sigma is the least noise whose epsilon after all rounds, by the Renyi accountant of opacus, is
    at most `epsilon`; the report has what was spent.

    In the paper each client takes DP-SGD steps, which protect single examples from the server too; here the server is
    trusted, and the noise is once for all clients. The guarantee is for the adapter and its card; reports of the rounds and
    the seed, from which noise and draws follow, are not for others.
    Raises PackageMissing without opacus, TrainingError for an epsilon that no noise reaches.
    """

    epsilon: Positive = 8.0
    delta: Annotated[float, Range(above=0, below=1)] = 1e-5
    clip: Positive = 1.0

    sampling: ClassVar[Literal["count", "poisson"]] = "poisson"
    secret: ClassVar[bool] = True

    def require(self, course: Course) -> None:
        self.noise(course)

    def noise(self, course: Course) -> float:
        """sigma, the noise's standard deviation in units of `clip`."""
        return _least_noise(self.epsilon, self.delta, course.rounds, course.sample_rate)

    def train(self, course: Course, order: Order) -> Trained:
        trained = super().train(course, order)
        moved = {name: value - order.received[name] for name, value in trained.update.items()}
        factor = min(1.0, self.clip / max(length(moved), 1e-30))
        return Trained({name: value * factor for name, value in moved.items()}, {}, trained.losses)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        """Whatever the clients sent, none counts with more than `clip`. A round may have drawn none."""
        sigma, expected = self.noise(course), course.sample_rate * len(course.clients)
        generator = seeded(course.settings.seed, "noise", number)
        factors = [min(1.0, self.clip / max(length(update), 1e-30)) for update in updates.values()]
        found: Tensors = {}
        for name, value in server.items():
            summed = sigma * self.clip * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for factor, update in zip(factors, updates.values(), strict=True):
                summed += factor * update[name].double()
            found[name] = (value.double() + summed / expected).float()
        return found

    def figures(self, course: Course, rounds_done: int) -> dict[str, float]:
        """What is guaranteed after so many rounds, and with which noise."""
        sigma = self.noise(course)
        accountant = _opacus()[0]()
        accountant.history = [(sigma, course.sample_rate, rounds_done)]
        with _any_order():
            spent = float(accountant.get_epsilon(self.delta, alphas=ORDERS)) if rounds_done else 0.0
        return {"epsilon": spent, "delta": self.delta, "noise_multiplier": sigma, "sample_rate": course.sample_rate}


def length(update: Tensors) -> float:
    """The Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(value.double().square().sum()) for _, value in sorted(update.items())))


@lru_cache
def _least_noise(epsilon: float, delta: float, rounds: int, sample_rate: float) -> float:
    _, least = _opacus()
    budget = {"target_epsilon": epsilon, "target_delta": delta, "steps": rounds, "sample_rate": sample_rate}
    try:
        with _any_order():
            found: float = least(**budget, accountant="rdp", alphas=ORDERS)
    except ValueError as error:
        raise TrainingError(
            f"no noise gives strategy 'dp_lora' epsilon={epsilon!r} at delta={delta!r} in {rounds} rounds ({error}): raise "
            "epsilon, or take fewer rounds"
        ) from error
    return found


@contextmanager
def _any_order() -> Iterator[None]:
    """Every order gives a bound that holds; opacus warns where the tightest that it tries is the last."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def _opacus() -> tuple[Any, Any]:
    """The accountant, and what finds the least noise."""
    try:
        from opacus.accountants import RDPAccountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise PackageMissing(f"strategy 'dp_lora' needs opacus ({error}): pip install 'loraweave[privacy]'") from error
    return RDPAccountant, get_noise_multiplier
