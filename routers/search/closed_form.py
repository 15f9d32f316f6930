"""Weights that a formula gives, in the form of a search: one candidate, whose loss is then known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from loraweave.routers.mixture import LARGEST, MixtureWeights
from loraweave.routers.search.solver import Solver, Start


@dataclass(eq=False, kw_only=True)
class ClosedForm(Solver):
    """Asks for the weights of the formula and is done: it chooses nothing, and makes one evaluation whatever the budget.

    MixtureWeights by layer are asked for as they are, also without `groups`. Raises WeightingError as `Solver` does.
    """

    learns: ClassVar[bool] = False

    start: Start = field(default=None, init=False)
    low: float = field(default=-LARGEST, init=False)
    high: float = field(default=LARGEST, init=False)

    def __post_init__(self) -> None:
        weights = self._weights()
        found = weights if isinstance(weights, MixtureWeights) else MixtureWeights.of(weights, self.experts)
        if self.groups is None:
            self.groups = {layer: (layer,) for layer in found.layers}
        self.start = found
        super().__post_init__()

    @abstractmethod
    def _weights(self) -> Mapping[str, float] | MixtureWeights:
        """What the formula gives."""

    def settings(self) -> dict[str, Any]:
        """Of what the formula takes, the start has all that there is to say."""
        return {name: value for name, value in super().settings().items() if name not in ("scores", "weights")}

    @property
    def num_trained(self) -> int:
        return 0

    def _propose(self) -> list[np.ndarray]:
        return [self.first]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        self._finished = True
