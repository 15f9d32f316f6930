"""What a search found, and how it came to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from loraweave.hub.drawing import blank_figure, count_along
from loraweave.routers.mixture import MixtureWeights


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and its loss, and the losses of all candidates in the order they were asked for.

    A candidate that could not be scored has an infinite loss. `cost` is how many evaluations each candidate counts for,
    `num_trained` the number of scalars that were chosen, `seconds` the time from the first candidate on, also before an
    interruption.
    """

    mixture: MixtureWeights = field(compare=False)
    loss: float
    losses: tuple[float, ...] = field(repr=False)
    num_trained: int = 0
    cost: int = 1
    seconds: float = field(default=0.0, compare=False)

    @property
    def weights(self) -> dict[str, float]:
        """{expert: weight}; ScopeError when layers have weights of their own."""
        return self.mixture.as_dict()

    @property
    def evaluations(self) -> int:
        return self.cost * len(self.losses)

    @property
    def failed(self) -> int:
        """How many candidates could not be scored."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    def curve(self) -> list[tuple[int, float]]:
        """(evaluations so far, lowest loss so far) after each candidate."""
        best = np.minimum.accumulate(self.losses).tolist()
        return [(self.cost * (number + 1), loss) for number, loss in enumerate(best)]

    def plot(self, path: str | Path) -> Path:
        """Writes a picture of the losses and of the lowest so far; the file's ending says which kind.

        Raises PackageMissing without matplotlib.
        """
        spent, best = zip(*self.curve(), strict=True)
        figure = blank_figure("the curve of a search is drawn with matplotlib", figsize=(6.0, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(spent, self.losses, ".", color="#999999", label="candidate")
        axes.step(spent, best, where="post", color="#0072B2", label="lowest so far")
        axes.set_xlabel("evaluations")
        count_along(axes)
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        figure.savefig(path)
        return Path(path)
