"""Ways that need no search: a mixture that was given, and the best adapter alone."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Choice
from loraweave.composer.composing.parts import Part
from loraweave.composer.example_loss import ExampleLoss
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

    def weights(self, examples: Sequence[int]) -> dict[str, float]:
        """{name: 1.0} of the adapter that is best on these examples."""
        return {self._names[self._best(examples)]: 1.0}

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        return [self._choice(self._best(part.seen)) for part in parts]

    def _best(self, examples: Sequence[int]) -> int:
        return int(self._losses_EN[:, list(examples)].mean(axis=1).argmin())

    def _choice(self, place: int) -> Choice:
        alone = MixtureWeights.of({self._names[place]: 1.0}, self._names)
        return Choice(self._engine, alone, known=(self._losses_EN[place], self._hits_EN[place]))
