"""The noise that a privacy budget needs, and the budget that noise spends, by opacus's Renyi accountant.

Both count steps of the sampled Gaussian mechanism (Mironov et al. 2019, arXiv 1908.10530): of all that are protected, each
takes part with probability `sample_rate`, and `noise` is the standard deviation of the noise added to a sum, in units of the
largest change that one of them can make to it.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from torch import Tensor

from loraweave import PackageMissing, TrainingError
from loraweave.extend import Positive, Range
from loraweave.extensions.federated.strategies._strategy import Course, Strategy

# orders of the Renyi divergence; small budgets need high ones
ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), 80, 96, 128, 192, 256, 512, 1024]


@dataclass(frozen=True, kw_only=True)
class PrivateStrategy(Strategy):
    """A strategy whose noise spends at most `epsilon` at `delta` in all; `clip` bounds what one client or example adds."""

    epsilon: Positive = 8.0
    delta: Annotated[float, Range(above=0, below=1)] = 1e-5
    clip: Positive = 1.0

    secret: ClassVar[bool] = True

    def exposure(self, course: Course, rounds: int) -> dict[str, Any]:
        """Return {"steps": the noisy steps of so many rounds, "sample_rate": the probability to take part in one}."""
        return {"steps": rounds, "sample_rate": course.sample_rate}

    def require(self, course: Course) -> None:
        self.noise(course)

    def noise(self, course: Course) -> float:
        """Return sigma: the noise's standard deviation over the largest change one client or example makes to the sum."""
        budget = {"epsilon": self.epsilon, "delta": self.delta}
        return least_noise(self.registered_name(), **budget, **self.exposure(course, course.rounds))

    def figures(self, course: Course, rounds_done: int) -> dict[str, float]:
        """Return {"epsilon": spent in so many rounds, "delta", "noise_multiplier": sigma, "sample_rate"} for the report."""
        sigma, exposure = self.noise(course), self.exposure(course, rounds_done)
        epsilon = spent(self.registered_name(), sigma, delta=self.delta, **exposure)
        return {
            "epsilon": epsilon,
            "delta": self.delta,
            "noise_multiplier": sigma,
            "sample_rate": exposure["sample_rate"],
        }


@lru_cache
def least_noise(strategy: str, *, epsilon: float, delta: float, steps: int, sample_rate: float) -> float:
    """Return the least noise that spends at most `epsilon` in so many steps.

    Raises PackageMissing without opacus, TrainingError for an epsilon that no noise reaches; both name the strategy.
    """
    _, least = _opacus(strategy)
    budget = {"target_epsilon": epsilon, "target_delta": delta, "steps": steps, "sample_rate": sample_rate}
    try:
        with _any_order():
            noise: float = least(**budget, accountant="rdp", alphas=ORDERS)
    except ValueError as error:
        raise TrainingError(
            f"no noise gives strategy {strategy!r} epsilon={epsilon!r} at delta={delta!r} in {steps} noisy steps ({error}): "
            "raise epsilon, or take fewer rounds"
        ) from error
    return noise


def spent(strategy: str, noise: float, *, delta: float, steps: int, sample_rate: float) -> float:
    """Return the epsilon that so many steps with this noise have spent. Raises PackageMissing without opacus."""
    accountant = _opacus(strategy)[0]()
    accountant.history = [(noise, sample_rate, steps)]
    with _any_order():
        return float(accountant.get_epsilon(delta, alphas=ORDERS)) if steps else 0.0


def length(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors))


@contextmanager
def _any_order() -> Iterator[None]:
    """Silence opacus's warning that the best order is the last it tried: a bound from any order is valid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def _opacus(strategy: str) -> tuple[Any, Any]:
    """Return opacus's accountant class and its search for the least noise. Raises PackageMissing without opacus."""
    try:
        from opacus.accountants import RDPAccountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise PackageMissing(f"strategy {strategy!r} needs opacus ({error}): pip install 'loraweave[privacy]'") from error
    return RDPAccountant, get_noise_multiplier
