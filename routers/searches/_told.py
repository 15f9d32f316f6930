"""The losses told to a search, saved in one JSON file; told again, they make the search ask for the same candidates."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.common.files import whole_file
from loraweave.errors import WeightingError
from loraweave.routers.weights import MixtureWeights

logger = logging.getLogger(__name__)


@dataclass
class Told:
    """The losses of all candidates so far, their gradients where the search wants them, and the seconds they took.

    `sizes` are the numbers of candidates that were asked for at a time. A gradient is written in hexadecimal notation,
    which gives back every bit.
    """

    sizes: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> Told:
        """Read a checkpoint; it is empty if there is no file. Raises WeightingError if damaged or of other settings."""
        if not path.is_file():
            return cls()
        try:
            stored = json.loads(path.read_text())
            known, sizes = stored["settings"], [int(size) for size in stored["sizes"]]
            losses = [math.inf if loss is None else float(loss) for loss in stored["losses"]]
            gradients = [[float.fromhex(value) for value in row] for row in stored["gradients"]]
            seconds = float(stored["seconds"])
            if sum(sizes) != len(losses):
                raise ValueError(f"{len(losses)} losses of {sum(sizes)} candidates")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightingError(f"the checkpoint {path} is damaged ({error}); delete it to start again") from error
        if known != json.loads(json.dumps(settings)):
            raise WeightingError(f"the checkpoint {path} belongs to a search with other settings; name another")
        return cls(sizes, losses, gradients, seconds)

    def write(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Replace the checkpoint. If that fails, log it and let the search go on."""
        content = {
            "settings": settings,
            "sizes": self.sizes,
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],
            "gradients": [[value.hex() for value in row] for row in self.gradients],
            "seconds": self.seconds,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(content))
        except OSError as error:
            logger.warning("the search goes on without its checkpoint %s: %s", path, error)


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and its loss, and the losses of all candidates in the order they were asked for.

    A candidate that could not be scored has an infinite loss. `cost` is how many evaluations each candidate counts for,
    `num_trained` the number of scalars that were chosen, `seconds` the time from the first candidate on, also before an
    interruption.
    """

    mixture: MixtureWeights = field(compare=False)
    loss: float = math.nan
    losses: tuple[float, ...] = field(default=(), repr=False)
    num_trained: int = 0
    cost: int = 1
    seconds: float = field(default=0.0, compare=False)

    @property
    def weights(self) -> dict[str, float]:
        """The weights {expert: weight}. Raises ScopeError if layers have weights of their own."""
        return self.mixture.as_dict()

    @property
    def evaluations(self) -> int:
        return self.cost * len(self.losses)

    @property
    def failed(self) -> int:
        """The number of candidates that could not be scored."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    def curve(self) -> list[tuple[int, float]]:
        """Return (evaluations so far, lowest loss so far) after each candidate."""
        best = np.minimum.accumulate(self.losses).tolist()
        return [(self.cost * (number + 1), loss) for number, loss in enumerate(best)]
