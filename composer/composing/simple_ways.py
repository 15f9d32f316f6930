"""Ways that need no search: a mixture that was given, and the best adapter alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Choice
from loraweave.composer.composing.parts import Part
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.routers.mixture import MixtureWeights


class Fixed:
    """A mixture that no example had a part in choosing."""

    learns = False

    def __init__(self, name: str, engine: Composer, mixture: MixtureWeights, merge_method: str = "linear") -> None:
        self.name = name
        self.evaluations = 1
        self._choice = Choice(engine, mixture, merge_method)

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        return [self._choice] * len(parts)


class BestSingle:
    """The adapter of the lowest mean loss on the examples seen, with weight 1; the earlier one when equal.

    All adapters are measured once, on all examples, when this is made.
    """

    name = "best_single"
    learns = True

    def __init__(self, engine: Composer, loss: ExampleLoss) -> None:
        self._engine = engine
        self._names = engine.pool.names
        self._losses_EN, self._hits_EN = loss.scores([MixtureWeights.of({name: 1.0}, self._names) for name in self._names])
        self.evaluations = len(self._names)

    def best(self, examples: Sequence[int], count: int) -> dict[str, float]:
        """1/count each for the adapters of the lowest losses on these examples; for all where there are fewer."""
        means_E = self._losses_EN[:, list(examples)].mean(axis=1)
        # stable, and NaN is last: of equal ones the earlier
        order = np.argsort(means_E, kind="stable")[:count]
        return {self._names[place]: 1 / len(order) for place in order}

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        return [self._choice(next(iter(self.best(part.seen, 1)))) for part in parts]

    def _choice(self, name: str) -> Choice:
        alone, place = MixtureWeights.of({name: 1.0}, self._names), self._names.index(name)
        return Choice(self._engine, alone, known=(self._losses_EN[place], self._hits_EN[place]))
