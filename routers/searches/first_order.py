"""Weights from slopes: one backward pass gives the loss's slope by every weight, a few more how the slopes change.

The loss is taken for a quadratic function of the weights, through the slopes at the best candidate and the changes between
those told so far (`_quadratic.py` has the formula). The next candidate is the model's lowest point in the box and not
farther than the trust radius from the best one, which grows while the model foretells the loss and shrinks where it does
not. A quadratic loss of E weights is solved after E + 1 candidates, one without cross terms after about three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loraweave.common.options import Positive
from loraweave.registry import traits
from loraweave.routers.searches._quadratic import fit_quadratic
from loraweave.routers.searches._solver import Solver

RADIUS = 0.5
RIDGE = 1e-4
# a smaller step, or a smaller foretold fall of the loss, ends the search
LEAST_STEP = 1e-5
LEAST_FALL = 1e-9


@traits("ends_early", "orderless")
@dataclass(eq=False, kw_only=True)
class FirstOrder(Solver):
    """Asks for the start, the base model unless given, and then for the lowest point of the model, one at a time.

    `radius` is how far a weight may go in the first step; `ridge` draws the model's curvature towards the same in all
    directions. It ends before its budget where the model foretells no lower loss. The other arguments are `Solver`'s.
    """

    needs_gradients: ClassVar[bool] = True
    cost: ClassVar[int] = 2

    radius: Positive = RADIUS
    ridge: Positive = RIDGE

    def __post_init__(self) -> None:
        super().__post_init__()
        # the candidates with a score: where, its loss, and its gradient
        self._known: list[tuple[np.ndarray, float, np.ndarray]] = []
        self._trusted = self.radius
        self._foretold = 0.0

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """At the base model: one backward pass there has the slopes of all adapters."""
        return None

    @property
    def _least(self) -> tuple[int, str]:
        return 2 * self.cost, "the start and one step, each with its gradient"

    def _propose(self) -> list[np.ndarray]:
        if not self._known:
            return [] if self._vectors else [self.first]
        best, loss, slope = self._best()
        others = [(w - best, gradient - slope) for w, _, gradient in self._known if not np.array_equal(w, best)]
        steps_KD = np.array([step for step, _ in others]).reshape(-1, len(best))
        changes_KD = np.array([change for _, change in others]).reshape(-1, len(best))
        # the largest slope alone leads to the edge of what is trusted
        curvature = float(np.abs(slope).max()) / self.radius or 1.0
        model = fit_quadratic(best, slope, steps_KD, changes_KD, curvature=curvature, ridge=self.ridge)
        low = np.maximum(best - self._trusted, self.space.low)
        high = np.minimum(best + self._trusted, self.space.high)
        lowest = model.lowest(low, high)
        self._foretold = -model.change(lowest - best)
        small = float(np.abs(lowest - best).max()) < LEAST_STEP
        return [] if small or self._foretold <= LEAST_FALL * max(abs(loss), 1e-3) else [lowest]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        for vector, loss, gradient in zip(vectors, losses, gradients, strict=True):
            if self._known:
                best, lowest, _ = self._best()
                self._trusted = self._trust(float(np.abs(vector - best).max()), lowest - loss)
            if math.isfinite(loss):
                self._known.append((vector, loss, gradient))

    def _trust(self, length: float, fallen: float) -> float:
        """The next radius after a step of a length, by how much of the foretold fall of the loss there was."""
        if fallen < 0.25 * self._foretold:
            return length / 4 if fallen == -math.inf else length / 2
        return 2 * self._trusted if fallen > 0.75 * self._foretold and length > 0.99 * self._trusted else self._trusted

    def _best(self) -> tuple[np.ndarray, float, np.ndarray]:
        return min(self._known, key=lambda known: known[1])
