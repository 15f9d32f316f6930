"""Bayesian search: a Gaussian process is fitted to the losses, and candidates have the largest expected improvement.

Expected improvement is that of Jones, Schonlau and Welch (1998). The process has a Matern kernel, one length for all weights
and a noise, from scikit-learn. The time to fit grows with the cube of the candidates: it is for some dozens of expensive
evaluations, each of which tells more the fewer weights there are.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from scipy.special import ndtr

from loraweave.extend import Count, Range
from loraweave.extend.routing import Solver

POPULATION = 4
# the number of points drawn for each candidate, half in the whole box and half around the best so far
NUM_DRAWS = 1024
# shares of the box's width between which each draw around the best has its spread
NEAREST, FARTHEST = 0.01, 0.3


@dataclass(eq=False, kw_only=True)
class Bayesian(Solver):
    """A search of the start and `initial` - 1 points spread around it, then of `population` candidates at a time.

    Each candidate is chosen as if those before it in its group had their expected losses. A failed candidate counts as the
    worst so far. By default a third of the budget is initial, and at most one more than twice the number of weights. The
    other arguments are `Solver`'s.
    """

    initial: Annotated[int, Range(least=2)] | None = None
    population: Count = POPULATION

    @property
    def _num_initial(self) -> int:
        if self.initial is not None:
            return self.initial
        most = 2 * self.space.size + 1
        return most if self.budget is None else max(2, min(most, self.budget // 3))

    @property
    def _least(self) -> tuple[int, str]:
        return self._num_initial + 1, f"{self._num_initial} initial candidates and one that they point to"

    def _propose(self) -> list[np.ndarray]:
        made = len(self._vectors)
        if made < self._num_initial:
            return [self.first, *self._fill_box()][made:]
        units, losses = self._observations()
        kernel = _fit_kernel(units, losses)
        generator = np.random.default_rng([self.seed, made])
        chosen: list[np.ndarray] = []
        for _ in range(self.population):
            draws = self._draw(generator, units[int(np.argmin(losses))])
            mean_N, deviation_N = _predict(kernel, units, losses, draws)
            best = int(np.argmax(expected_improvement(mean_N, deviation_N, float(losses.min()))))
            chosen.append(draws[best])
            units, losses = np.vstack([units, draws[best]]), np.append(losses, mean_N[best])
        low, high = self.space.low, self.space.high
        return [low + (high - low) * unit for unit in chosen]

    def _fill_box(self) -> list[np.ndarray]:
        """Return the other initial candidates: a Latin hypercube of points around the start."""
        count, generator = self._num_initial - 1, np.random.default_rng([self.seed, 0])
        places = np.stack([generator.permutation(count) for _ in range(self.space.size)], axis=1)
        units = (places + generator.uniform(size=places.shape)) / max(count, 1)
        points = self.space.low + (self.space.high - self.space.low) * units
        # many adapters at once with weights of the box's size spoil any model: their sizes together stay those of two
        spread = min(1.0, 2 / self.space.size)
        return list(self.first + spread * (points - self.first))

    def _observations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the candidates' points in the unit box, and the logarithms of their losses, of mean 0 and deviation 1.

        The logarithm begins at the lowest loss: spoilt models have losses of a hundred times the differences that matter.
        """
        losses = np.array(self._told.losses)
        scored = losses[np.isfinite(losses)]
        above = np.where(np.isfinite(losses), losses, scored.max() if len(scored) else 0.0)
        above = above - above.min()
        logs = np.log1p(above / (np.median(above) or 1.0))
        units = (np.stack(self._vectors) - self.space.low) / (self.space.high - self.space.low)
        return units, (logs - logs.mean()) / (logs.std() or 1.0)

    def _draw(self, generator: np.random.Generator, best: np.ndarray) -> np.ndarray:
        half, size = NUM_DRAWS // 2, self.space.size
        anywhere = generator.uniform(size=(half, size))
        scales = np.exp(generator.uniform(np.log(NEAREST), np.log(FARTHEST), (half, 1)))
        near = best + scales * generator.standard_normal((half, size))
        return np.vstack([anywhere, np.clip(near, 0.0, 1.0)])


def _fit_kernel(units: np.ndarray, losses: np.ndarray) -> Any:
    """Return the Gaussian process's kernel that makes the losses (N) at the points `units` (N, D) most likely."""
    # scikit-learn takes a second to import and the catalogue should not wait for it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    scale = math.sqrt(units.shape[1])
    smooth = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(0.5 * scale, (0.03 * scale, 10 * scale), nu=2.5)
    process = GaussianProcessRegressor(smooth + WhiteKernel(1e-3, (1e-8, 1.0)))
    with warnings.catch_warnings():
        # a length or a noise at the edge of its range is an answer too
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(units, losses).kernel_


def _predict(kernel: Any, units: np.ndarray, losses: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean_N, deviation_N) of the loss at each of N draws, given known losses; the noise is not part of it."""
    from sklearn.gaussian_process import GaussianProcessRegressor

    process = GaussianProcessRegressor(kernel, optimizer=None).fit(units, losses)
    mean_N, deviation_N = process.predict(draws, return_std=True)
    noise = kernel.k2.noise_level
    return mean_N, np.sqrt(np.maximum(deviation_N**2 - noise, 0.0))


def expected_improvement(mean_N: np.ndarray, deviation_N: np.ndarray, best: float) -> np.ndarray:
    """Return E[max(best - y, 0)] for each y distributed as N(mean, deviation^2); a deviation of 0 means no uncertainty."""
    below_N = best - mean_N
    sure_N = deviation_N <= 0
    z_N = below_N / np.where(sure_N, 1.0, deviation_N)
    density_N = np.exp(-(z_N**2) / 2) / math.sqrt(2 * math.pi)
    expected_N = below_N * ndtr(z_N) + deviation_N * density_N
    return np.where(sure_N, np.maximum(below_N, 0.0), expected_N)
