"""Weights that a formula gives, in the form of a search: one candidate, whose loss is then known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from loraweave.routers.mixture import LARGEST, MixtureWeights
from loraweave.routers.search.solver import Solver


class ClosedForm(Solver):
    """Asks for the given weights and is done: it chooses nothing, and makes one evaluation whatever the budget.

    MixtureWeights by layer are asked for as they are, also without `groups`. Raises WeightingError as `Solver` does.
    """

    learns: ClassVar[bool] = False

    def __init__(
        self,
        experts: Sequence[str],
        weights: Mapping[str, float] | MixtureWeights,
        *,
        budget: int | None = 40,
        seconds: float | None = None,
        seed: int = 0,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        start = weights if isinstance(weights, MixtureWeights) else MixtureWeights.of(weights, experts)
        if groups is None:
            groups = {layer: (layer,) for layer in start.layers}
        limits = {"low": -LARGEST, "high": LARGEST}
        super().__init__(experts, budget=budget, seconds=seconds, seed=seed, start=start, groups=groups, **limits)

    @property
    def num_trained(self) -> int:
        return 0

    def _propose(self) -> list[np.ndarray]:
        return [self.start]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        self._finished = True
