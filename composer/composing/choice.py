"""What a way of composing came to on some of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loraweave.composer.composer import Composer
from loraweave.composer.composing.parts import Part
from loraweave.hub.adapter import Adapter
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router


@dataclass(frozen=True, eq=False)
class Choice:
    """A mixture over the experts of `engine`, and what `merge_method` makes of its weights.

    `losses` are those of the search's candidates in their order. `known` is (loss_N, hit_N) on all examples where they have
    been measured already. `adapter` is what a mixture was trained on to for `tuned_steps`: the engine then has it as an
    expert, of weight 1, and `origin` is the choice that it began as. Where there is a `router`, it counts and no mixture.
    """

    engine: Composer
    mixture: MixtureWeights
    merge_method: str = "linear"
    num_trained: int = 0
    failed: int = 0
    losses: tuple[float, ...] = ()
    known: tuple[np.ndarray, np.ndarray] | None = None
    adapter: Adapter | None = None
    origin: Choice | None = None
    tuned_steps: int = 0
    router: Router | None = None


class Way(Protocol):
    """A way to choose a mixture by the examples that a part sees; `learns` says whether these have a say in it."""

    name: str
    learns: bool
    evaluations: int

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        """A choice for each part, which knows nothing of the part's held-out examples."""
        ...
