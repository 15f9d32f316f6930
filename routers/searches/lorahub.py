"""LoraHub: one weight per adapter, searched without gradients on a few examples (Huang et al. 2023, arXiv 2307.13269).

The search is CMA-ES, from the `cma` package. Its candidates are task-scope weights inside a box; what they mean (a mixture
of deltas, or of the factors apart) is the objective's matter, and so is the paper's L1 term, 0.05 * mean|w|.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from loraweave.common.options import NonNegative, Positive, Range, Whole
from loraweave.routers.searches._solver import Solver

# at 40 evaluations in 20 dimensions a step of 0.5 hardly improves; 0.2 halves the loss
SIGMA = 0.2
POPULATION = 8
RESTARTS = 9
# losses are means of a few token losses, perhaps computed in bf16, so smaller differences mean nothing
TOLERANCE = 1e-6


@dataclass(eq=False, kw_only=True)
class Lorahub(Solver):
    """A search that asks for the start, then for generations of `population` candidates; the last one is cut to the budget.

    `sigma` is the first step size. Without a start the search begins at the base model; to begin where retrieval points,
    start=Similarity(experts, scores=scores).ask()[0]. When the losses of the last generations differ by less than
    `tolerance`, or the steps have become too small to matter, the search restarts at a random point of the box, with
    twice the population and steps of a quarter of the box (IPOP, Auger and Hansen 2005), at most `restarts` times; then it
    is over. The other arguments are `Solver`'s.
    """

    # the paper's
    l1 = 0.05

    sigma: Positive = SIGMA
    population: Annotated[int, Range(least=2)] = POPULATION
    restarts: Whole = RESTARTS
    tolerance: NonNegative = TOLERANCE

    def __post_init__(self) -> None:
        super().__post_init__()
        self._strategy: Any = None
        self._generator = np.random.default_rng(self.seed)
        self._restarted = 0

    @property
    def _least(self) -> tuple[int, str]:
        return 1 + self.population, f"the start and one generation of {self.population}"

    def _propose(self) -> list[np.ndarray]:
        if not self._vectors:
            return [self.first]
        if self._strategy is None:
            self._strategy = self._evolution()
        return list(self._strategy.ask())

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        scored = [loss for loss in losses if math.isfinite(loss)]
        if self._strategy is None or not scored or len(vectors) < self._strategy.popsize:
            return
        # cma accepts infinities silently and drifts: a failed candidate counts as slightly worse than the worst
        worst = max(scored) + 1.0
        self._strategy.tell(list(vectors), [loss if math.isfinite(loss) else worst for loss in losses])
        if self._strategy.stop():
            self._strategy = None
            self._restarted += 1
            self._finished = self._restarted > self.restarts

    def _evolution(self) -> Any:
        """Make cma's strategy, which begins at the start, or at a random point for a restart."""
        # cma takes a second to import and the catalogue should not wait for it
        with warnings.catch_warnings():
            # it warns where matplotlib, which only its own plots need, is missing
            warnings.filterwarnings("ignore", message="Could not import matplotlib")
            import cma

        low, high = self.space.low, self.space.high
        options = {
            "bounds": [low, high],
            "popsize": self.population * 2**self._restarted,
            "tolfun": self.tolerance,
            "tolfunhist": self.tolerance,
            "verbose": -9,
            # a seed would reset numpy's global generator: NaN leaves it alone, and the numbers come from our own
            "seed": math.nan,
            "randn": lambda *shape: self._generator.standard_normal(shape),
        }
        if not self._restarted:
            return cma.CMAEvolutionStrategy(self.first, self.sigma, options)
        place = self._generator.uniform(low, high, self.space.size)
        return cma.CMAEvolutionStrategy(place, (high - low) / 4, options)
