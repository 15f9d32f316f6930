"""Random search: candidates drawn without regard to the losses, a baseline for every other search."""

from dataclasses import dataclass

import numpy as np

from loraweave.common.options import Count
from loraweave.errors import WeightingError
from loraweave.routers.searches._solver import Solver

POPULATION = 8


@dataclass(eq=False, kw_only=True)
class Random(Solver):
    """A search that asks for the start, then for draws, `population` at a time; the other arguments are `Solver`'s.

    Weights are uniform in the box; with `simplex=True` they are uniform among those that are not negative and sum to 1 (in
    each group of layers), which a box with 0 and 1 in it must hold. Draw n depends on the seed and on n alone.
    """

    simplex: bool = False
    population: Count = POPULATION

    def _propose(self) -> list[np.ndarray]:
        made = len(self._vectors)
        return [self._draw(number) if number else self.first for number in range(made, made + self.population)]

    def _draw(self, number: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, number])
        if not self.simplex:
            return generator.uniform(self.space.low, self.space.high, self.space.size)
        num_experts = len(self.experts)
        return generator.dirichlet(np.ones(num_experts), self.space.size // num_experts).flatten()

    def _require_options(self) -> None:
        if self.simplex and not (self.space.low <= 0 and self.space.high >= 1):
            raise WeightingError(
                f"weights that sum to 1 lie in [0, 1], but the box is [{self.space.low}, {self.space.high}]; "
                "widen it with low= and high=, or leave simplex= out"
            )
