"""The base class of searches for mixture weights: ask for candidates, tell their losses, stop, return the best.

A solver sees names and losses, never a model: (experts, objective) -> MixtureWeights.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from torch import Tensor

from loraweave.common.display import progress_bar
from loraweave.common.options import Count, Declared, Positive, Seed
from loraweave.common.process import launched_processes
from loraweave.errors import SearchFailed, WeightingError
from loraweave.registry import traits
from loraweave.routers.searches._space import Space
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.weights import LARGEST, MixtureWeights

Start = Mapping[str, float] | MixtureWeights | None

# options that describe a task, from which a formula makes its weights
OF_THE_TASK = ("scores", "weights", "texts", "asked")
# consecutive candidates without a score after which a search gives up
MAX_FAILED = 16


@dataclass(eq=False)
class Solver(Declared, ABC):
    """A search that asks for candidates until `budget` evaluations or `seconds` are spent, whichever comes first.

    `experts` are names; their weights lie in [low, high]. `start` is the first candidate: a mapping, MixtureWeights, or None
    for the base model. With `groups`, {name: layers}, each group of layers has weights of its own. One evaluation is one
    candidate scored on all examples; a candidate costs `cost` evaluations. With `budget=None` only the seconds limit the
    search; a population is cut to what is left of either.

    A subclass is a dataclass, too, whose own options are its fields; its __post_init__ prepares its state, after this
    class's has checked the options.

    The same settings and losses give the same candidates, bit for bit. numpy's global generator is left alone. Raises
    WeightingError for settings that cannot be used, SearchFailed when no candidate can be scored.
    """

    noun: ClassVar[str] = "method"
    needs_gradients: ClassVar[bool] = False
    # compose()'s default loss, merge method and L1 coefficient for this search
    loss: ClassVar[str] = "cross_entropy"
    merge_method = "linear"
    l1: ClassVar[float] = 0.0
    # False for weights that do not depend on the examples
    learns: ClassVar[bool] = True
    # a backward pass through frozen weights is as much arithmetic as the forward pass
    cost: ClassVar[int] = 1

    experts: Sequence[str]
    _: KW_ONLY
    budget: Count | None = 40
    seconds: Positive | None = None
    seed: Seed = 0
    start: Start = None
    low: float = -1.5
    high: float = 1.5
    groups: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        grouped = {name: tuple(layers) for name, layers in (self.groups or {}).items()}
        self.space = Space(tuple(self.experts), self.low, self.high, grouped)
        # the vector of the start
        self.first = self.space.vector(self.start)
        self._require_options()
        if self.budget is None and self.seconds is None:
            raise WeightingError("a search needs a budget of evaluations, or of seconds, or both")
        require_one_clock(self.seconds)
        least, what = self._least
        if self.budget is not None and self.budget < least:
            raise WeightingError(
                f"budget is {self.budget} evaluations, but {type(self).__name__} needs at least {least}, {what}; "
                "raise the budget, or ask for less"
            )
        self._asked: list[np.ndarray] = []
        self._vectors: list[np.ndarray] = []
        self._told = Told()
        self._started: float | None = None
        self._earlier_s = 0.0
        # a subclass sets it when it has nothing further to ask
        self._finished = False

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """Name where compose() starts a search with these options, one of its `STARTS`; None for the solver's own start."""
        return "best_single"

    @property
    def num_trained(self) -> int:
        """The number of scalars that the search chooses."""
        return self.space.size

    @abstractmethod
    def _propose(self) -> list[np.ndarray]:
        """Return the next vectors to try; `ask` drops those beyond the budget."""

    def _require_options(self) -> None:
        """Raise WeightingError for options of the subclass that cannot be used."""

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        """Use the losses of `vectors`, infinite for a failed candidate, and d loss / d vector where gradients are needed."""

    @property
    def _least(self) -> tuple[int, str]:
        """The fewest evaluations that the search needs, and a phrase that says what for."""
        return self.cost, "one candidate"

    def ask(self) -> list[MixtureWeights]:
        """Return the next candidates: the same ones until their losses are told, and [] when the search is over."""
        if self._started is None:
            self._started = time.monotonic()
        if not self._asked and not self._finished and (left := self._left()) > 0:
            self._asked = self._propose()[:left]
            self._finished = not self._asked
        return list(map(self.space.mixture, self._asked))

    def tell(self, losses: Sequence[float], gradients: Sequence[Tensor] | None = None) -> None:
        """Pass the losses of the candidates asked for, in order; NaN or infinity for a candidate that cannot be scored.

        `gradients` are d loss / d values_BTLE, for a solver that needs them; one that is not finite fails its candidate.
        """
        if len(losses) != len(self._asked):
            raise WeightingError(f"{len(losses)} losses were told for {len(self._asked)} candidates")
        if self.needs_gradients and (gradients is None or len(gradients) != len(losses)):
            num_told = "none" if gradients is None else str(len(gradients))
            raise WeightingError(f"{type(self).__name__} needs the gradient of each loss, but was told {num_told}")
        self._take(list(map(float, losses)), list(map(self.space.pull, gradients or ())))

    def _take(self, losses: list[float], gradients: list[np.ndarray]) -> None:
        sound = [not gradients or bool(np.isfinite(gradients[number]).all()) for number in range(len(losses))]
        scored = [loss if math.isfinite(loss) and ok else math.inf for loss, ok in zip(losses, sound, strict=True)]
        candidates, self._asked = self._asked, []
        self._vectors.extend(candidates)
        self._told.sizes.append(len(candidates))
        self._told.losses.extend(scored)
        self._told.gradients += [gradient.tolist() for gradient in gradients]
        recent = self._told.losses[-MAX_FAILED:]
        if len(recent) == MAX_FAILED and not any(map(math.isfinite, recent)):
            raise SearchFailed(
                f"none of the last {MAX_FAILED} candidates could be scored (NaN or infinite loss); {self.spent} of "
                f"{self.budget} evaluations were made. Look at the objective or at damaged adapters"
            )
        self._learn(candidates, scored, gradients)

    @property
    def spent(self) -> int:
        """The number of evaluations so far."""
        return self.cost * len(self._told.losses)

    def stop(self) -> bool:
        """Return True if the search is over: its budget is used up, or it has nothing left to ask."""
        return self._finished or (not self._asked and self._left() < 1)

    def result(self) -> SearchResult:
        """Return the best candidate so far, the earlier one of equal losses. Raises SearchFailed if none could be scored."""
        losses = self._told.losses
        if not any(map(math.isfinite, losses)):
            raise SearchFailed(f"none of {len(losses)} candidates could be scored (NaN or infinite loss)")
        best = int(np.argmin(losses))
        mixture = self.space.mixture(self._vectors[best])
        return SearchResult(mixture, losses[best], tuple(losses), self.num_trained, self.cost, self._elapsed())

    def solve(
        self,
        objective: Objective,
        *,
        checkpoint: str | Path | None = None,
        on_progress: Callable[[int], object] | None = None,
        progress: bool = False,
    ) -> SearchResult:
        """Run the search to its end and return the best candidate.

        With `checkpoint`, a JSON file, all losses told are saved; the same search resumed from it asks for the same
        candidates and has the same result. A file of other settings is refused, and so is a file of another objective if the
        objective has `describe()`. `on_progress` is called with the number of evaluations just made; `progress` shows a bar
        with the lowest loss.
        """
        path = None if checkpoint is None else Path(checkpoint)
        kept = {} if path is None else {**self.settings(), **described(objective)}
        if path is not None:
            self.replay(Told.read(path, kept))
        with progress_bar(progress, field="best") as bar:
            shown = bar.add_task(type(self).__name__.lower(), total=self.budget, completed=self.spent, best="")
            while not self.stop() and (candidates := self.ask()):
                self.tell(*self._evaluate(objective, candidates))
                if path is not None:
                    self.keep(path, kept)
                made = self.cost * len(candidates)
                if on_progress:
                    on_progress(made)
                bar.update(shown, advance=made, best=f"lowest loss {min(self._told.losses):.4f}")
        return self.result()

    def replay(self, told: Told) -> None:
        """Repeat an earlier run of the same search from the losses that it was told."""
        self._earlier_s = told.seconds
        position = 0
        for size in told.sizes:
            self._asked = self._propose()[:size]
            gradients = [np.array(row) for row in told.gradients[position : position + size]]
            self._take(told.losses[position : position + size], gradients)
            position += size

    def keep(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write all losses told so far to a checkpoint with these settings."""
        self._told.seconds = self._elapsed()
        self._told.write(path, settings)

    def settings(self) -> dict[str, Any]:
        """Return {name: value} of all that determines the candidates besides the losses; a checkpoint must have the same."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        experts, groups = self.space.experts, self.space.groups
        return {"solver": type(self).__name__, **options, "experts": experts, "start": self.first.tolist(), "groups": groups}

    def _evaluate(
        self, objective: Objective, candidates: Sequence[MixtureWeights]
    ) -> tuple[Sequence[float], Sequence[Tensor] | None]:
        if not self.needs_gradients:
            return objective(candidates), None
        if not hasattr(objective, "gradients"):
            raise WeightingError(
                f"{type(self).__name__} needs an objective with gradients(), and {type(objective).__name__} has none; "
                "take a loss that has gradients, or a solver that needs none"
            )
        return cast(DifferentiableObjective, objective).gradients(candidates)

    def _elapsed(self) -> float:
        return self._earlier_s + (0.0 if self._started is None else time.monotonic() - self._started)

    def _left(self) -> int:
        """Return how many more candidates the budget and the seconds allow."""
        left = 10**9 if self.budget is None else (self.budget - self.spent) // self.cost
        if self.seconds is None:
            return left
        remaining_s = self.seconds - self._elapsed()
        if remaining_s <= 0:
            return 0
        made = len(self._told.losses)
        # the number that fits into the remaining time at the mean time per candidate so far
        in_time = int(remaining_s * made / self._elapsed()) if made else left
        return min(left, max(in_time, 1))


def require_one_clock(seconds: float | None) -> None:
    """Raise WeightingError for a limit in seconds with several launched processes, since they would end differently."""
    if seconds is not None and (count := launched_processes()) > 1:
        raise WeightingError(
            f"{count} processes were launched, and each would end its search after another number of candidates with "
            f"seconds={seconds:g}: give a budget of evaluations instead, which all of them share"
        )


@traits("ends_early")
@dataclass(eq=False, kw_only=True)
class ClosedForm(Solver):
    """A search whose one candidate is the weights of a formula: it chooses nothing and makes one evaluation.

    MixtureWeights by layer keep their layers, also without `groups`. Raises WeightingError for unusable settings.
    """

    learns: ClassVar[bool] = False

    start: Start = field(default=None, init=False)
    low: float = field(default=-LARGEST, init=False)
    high: float = field(default=LARGEST, init=False)

    def __post_init__(self) -> None:
        start = MixtureWeights.of(self._weights(), self.experts)
        if self.groups is None:
            self.groups = {layer: (layer,) for layer in start.layers}
        self.start = start
        super().__post_init__()

    @abstractmethod
    def _weights(self) -> Mapping[str, float] | MixtureWeights:
        """Return the weights of the formula."""

    def settings(self) -> dict[str, Any]:
        """Return the settings but for the formula's inputs, since `start` holds the weights that the formula gave."""
        return {name: value for name, value in super().settings().items() if name not in OF_THE_TASK}

    @property
    def num_trained(self) -> int:
        return 0

    def _propose(self) -> list[np.ndarray]:
        return [self.first]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        self._finished = True


class Objective(Protocol):
    """A loss of candidates, lower is better; NaN or infinity marks one that cannot be scored.

    Several candidates come in one call, so that an objective can evaluate a whole population in one forward pass. The
    result must not depend on how candidates are grouped into calls, beyond rounding.
    """

    def __call__(self, candidates: Sequence[MixtureWeights]) -> Sequence[float]: ...


def described(objective: Objective) -> dict[str, Any]:
    """Return {"objective": the result of its `describe()`}, which identifies its losses as JSON; {} if it has none."""
    describe = getattr(objective, "describe", None)
    return {} if describe is None else {"objective": describe()}


class DifferentiableObjective(Objective, Protocol):
    """An objective that also returns the gradient of each loss by the candidate's weights."""

    def gradients(self, candidates: Sequence[MixtureWeights]) -> tuple[Sequence[float], Sequence[Tensor]]:
        """Return the loss of each candidate, and d loss / d values_BTLE, in the shape of its values."""
        ...
