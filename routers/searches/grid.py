"""Grid search over a few strengths of each adapter, as ControlPE sets its adapters' (Sun et al. 2023, arXiv 2311.09773).

A lattice has strengths ** weights points, so this is for few adapters; coordinate by coordinate it goes further.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraweave.errors import WeightingError
from loraweave.registry import traits
from loraweave.routers.searches._solver import Solver

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# the candidates of a lattice asked for at a time; one weight's strengths are all asked for together
POPULATION = 8


@traits("ends_early")
@dataclass(eq=False, kw_only=True)
class Grid(Solver):
    """A search that asks for the start, then for every other point of a lattice in order, the last weight varying fastest.

    With `coordinate=True` one weight at a time tries all `strengths`, from the start on, and keeps the best if that is an
    improvement; sweeps are repeated until one changes nothing. The other arguments are `Solver`'s. Raises WeightingError
    for a budget that does not reach the end of the lattice, or of a sweep that improves nothing.
    """

    strengths: Sequence[float] = STRENGTHS
    coordinate: bool = False

    def __post_init__(self) -> None:
        self.strengths = tuple(dict.fromkeys(float(strength) for strength in self.strengths))
        self._place = 0
        self._unchanged = 0
        super().__post_init__()
        self._best, self._loss = self.first, math.inf

    def _propose(self) -> list[np.ndarray]:
        if not self._vectors:
            return [self.first]
        return self._line() if self.coordinate else self._points()

    def _points(self) -> list[np.ndarray]:
        """Return the next points of the lattice, by their numbers in base `len(strengths)`."""
        made = len(self._vectors) - 1
        numbers = range(made, min(made + POPULATION, self._num_points - 1))
        # the start has been asked for, where it is a point
        return [self._point(number + (number >= self._start_number)) for number in numbers]

    def _point(self, number: int) -> np.ndarray:
        base, digits = len(self.strengths), []
        for _ in range(self.space.size):
            number, digit = divmod(number, base)
            digits.append(self.strengths[digit])
        return np.array(digits[::-1])

    @property
    def _start_number(self) -> int:
        """The start's place in the lattice, or the number of the lattice's points if the start is not one of them."""
        if not set(self.first.tolist()) <= set(self.strengths):
            return self._size
        number = 0
        for strength in self.first.tolist():
            number = number * len(self.strengths) + self.strengths.index(strength)
        return number

    @property
    def _num_points(self) -> int:
        """The number of candidates: the points of the lattice, and the start if it is not one of them."""
        return self._size + (self._start_number == self._size)

    @property
    def _size(self) -> int:
        return math.prod([len(self.strengths)] * self.space.size)

    def _line(self) -> list[np.ndarray]:
        """Return the best vector with the next weight set to each other strength; [] if no weight has one left."""
        while self._unchanged < self.space.size:
            others = [strength for strength in self.strengths if strength != self._best[self._place]]
            if others:
                return [self._change(strength) for strength in others]
            self._step(unchanged=self._unchanged + 1)
        return []

    def _change(self, strength: float) -> np.ndarray:
        vector = self._best.copy()
        vector[self._place] = strength
        return vector

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        best = int(np.argmin(losses))
        improved = losses[best] < self._loss
        if improved:
            self._best, self._loss = vectors[best], losses[best]
        if self.coordinate and len(self._vectors) > 1:
            # after an improvement all other weights are tried again before the search ends
            self._step(unchanged=1 if improved else self._unchanged + 1)
        self._finished = not self._propose()

    def _step(self, *, unchanged: int) -> None:
        self._place = (self._place + 1) % self.space.size
        self._unchanged = unchanged

    def _require_options(self) -> None:
        if not self.strengths:
            raise WeightingError("a grid needs at least one strength")
        outside = [strength for strength in self.strengths if not self.space.low <= strength <= self.space.high]
        if outside:
            raise WeightingError(
                f"strength {outside[0]} is outside [{self.space.low}, {self.space.high}]; "
                "leave it out, or widen the box with low= and high="
            )
        if not self.coordinate and self.budget is not None and self.budget < self._num_points:
            raise WeightingError(
                f"budget is {self.budget} evaluations, but {len(self.strengths)} strengths of {self.space.size} weights are "
                f"{self._num_points} candidates with the start; raise the budget, give fewer strengths or experts, "
                "or pass coordinate=True to change one weight at a time"
            )

    @property
    def _least(self) -> tuple[int, str]:
        if not self.coordinate:
            return super()._least
        others = [len(set(self.strengths) - {value}) for value in self.first.tolist()]
        return 1 + sum(others), f"the start and every other strength of {self.space.size} weights"
