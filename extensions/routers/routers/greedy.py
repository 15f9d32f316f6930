"""Greedy selection of adapters: those that lower the loss are averaged, a greedy soup (Wortsman et al., arXiv 2203.05482).

AdapterSoup averages adapters that a retriever picks (Chronopoulou et al. 2023, arXiv 2302.07027); here the losses pick them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraweave import WeightingError
from loraweave.extend import traits
from loraweave.extend.routing import Solver


@traits("ends_early", "orderless")
@dataclass(eq=False, kw_only=True)
class Greedy(Solver):
    """A search that tries the start and every expert alone, then adds experts, then removes those that do not help.

    Adding begins with the expert of the lowest loss alone; the others are tried in the order of their losses, and each stays
    if the loss is lower with it. Then the mixtures without one of the members are tried together, and the best of them is
    taken as long as it lowers the loss. Members weigh 1 / their number, or `strength` each, and the others 0. With groups of
    layers, members are chosen for each group. The other arguments are `Solver`'s.
    """

    strength: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loss = math.inf
        self._members: list[int] = []
        self._untried: list[int] = []

    @property
    def _least(self) -> tuple[int, str]:
        return 1 + self.space.size, f"the start and each of {self.space.size} weights alone"

    def _propose(self) -> list[np.ndarray]:
        if not self._vectors:
            return [self.first, *(self._soup([place]) for place in range(self.space.size))]
        if self._untried:
            return [self._soup([*self._members, self._untried[0]])]
        # of two members each has been measured alone
        return [self._soup(self._without(place)) for place in self._members] if len(self._members) > 2 else []

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        best = int(np.argmin(losses))
        if len(vectors) == len(self._vectors):
            self._order(losses[1:])
        elif self._untried:
            tried = self._untried.pop(0)
            if losses[0] < self._loss:
                self._members.append(tried)
                self._loss = losses[0]
        elif losses[best] < self._loss:
            self._members = self._without(self._members[best])
            self._loss = losses[best]
        else:
            self._finished = True
        self._finished = self._finished or not self._propose()

    def _order(self, losses: Sequence[float]) -> None:
        """Take the expert of the lowest loss as the first member and queue the others by loss, without non-finite ones."""
        scored = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
        ordered = sorted(scored, key=lambda place: losses[place])
        self._members, self._untried = ordered[:1], ordered[1:]
        self._loss = min(losses, default=math.inf)

    def _without(self, place: int) -> list[int]:
        return [member for member in self._members if member != place]

    def _soup(self, members: Sequence[int]) -> np.ndarray:
        chosen = np.zeros(self.space.size)
        chosen[list(members)] = 1.0
        if self.strength is not None:
            return chosen * self.strength
        chosen_GE = chosen.reshape(-1, len(self.experts))
        counts_G1 = np.maximum(chosen_GE.sum(axis=1, keepdims=True), 1)
        return np.asarray(chosen_GE / counts_G1).flatten()

    def _require_options(self) -> None:
        alone = 1.0 if self.strength is None else self.strength
        if not (self.space.low <= min(alone, 0.0) and max(alone, 0.0) <= self.space.high):
            raise WeightingError(
                f"members weigh up to {alone} and the others 0, but weights lie in [{self.space.low}, {self.space.high}]; "
                "widen the box with low= and high=, or set strength="
            )
