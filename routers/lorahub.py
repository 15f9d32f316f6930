"""LoraHub: one weight per adapter, searched without gradients on a few examples (Huang et al. 2023, arXiv 2307.13269).

The search is CMA-ES, from the `cma` package. Its candidates are task-scope weights inside a box; what they mean (a mixture
of deltas, or of the factors apart) is the objective's matter, and so is the paper's L1 term, 0.05 * mean|w|.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loraweave.errors import WeightingError
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.search.solver import Solver

# at 40 evaluations in 20 dimensions a step of 0.5 hardly improves; 0.2 halves the loss
SIGMA = 0.2
POPULATION = 8


class Lorahub(Solver):
    """Asks for the start alone, then for generations of `population` candidates; the last one is cut to the budget.

    `sigma` is the first step size. Without a start the search begins at the base model. The other arguments are `Solver`'s.
    """

    # the paper's
    l1 = 0.05

    def __init__(
        self,
        experts: Sequence[str],
        *,
        budget: int | None = 40,
        seconds: float | None = None,
        seed: int = 0,
        start: Mapping[str, float] | MixtureWeights | None = None,
        low: float = -1.5,
        high: float = 1.5,
        groups: Mapping[str, Sequence[str]] | None = None,
        sigma: float = SIGMA,
        population: int = POPULATION,
    ) -> None:
        self.sigma = sigma
        self.population = population
        self._strategy: Any = None
        super().__init__(experts, budget=budget, seconds=seconds, seed=seed, start=start, low=low, high=high, groups=groups)

    @property
    def _least(self) -> tuple[int, str]:
        return 1 + self.population, f"the start and one generation of {self.population}"

    def _propose(self) -> list[np.ndarray]:
        return list(self._evolution().ask()) if self._vectors else [self.start]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        scored = [loss for loss in losses if math.isfinite(loss)]
        if self._strategy is not None and scored and len(vectors) == self.population:
            # cma accepts infinities silently and drifts: a failed candidate counts as slightly worse than the worst
            worst = max(scored) + 1.0
            self._strategy.tell(list(vectors), [loss if math.isfinite(loss) else worst for loss in losses])

    def _evolution(self) -> Any:
        if self._strategy is None:
            # cma takes a second to import and the catalogue should not wait for it
            with warnings.catch_warnings():
                # it warns where matplotlib, which only its own plots need, is missing
                warnings.filterwarnings("ignore", message="Could not import matplotlib")
                import cma

            generator = np.random.default_rng(self.seed)
            options = {
                "bounds": [self.space.low, self.space.high],
                "popsize": self.population,
                "verbose": -9,
                # a seed would reset numpy's global generator: NaN leaves it alone, and the numbers come from our own
                "seed": math.nan,
                "randn": lambda *shape: generator.standard_normal(shape),
            }
            self._strategy = cma.CMAEvolutionStrategy(self.start, self.sigma, options)
        return self._strategy

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sigma": self.sigma, "population": self.population}

    def _require_options(self) -> None:
        if not self.sigma > 0 or not math.isfinite(self.sigma):
            raise WeightingError(f"sigma is {self.sigma!r}; the first step size must be above 0")
        if isinstance(self.population, bool) or not isinstance(self.population, int) or self.population < 2:
            raise WeightingError(f"population is {self.population!r}; a generation has at least 2 candidates")
