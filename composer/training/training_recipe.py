"""What determines a trained adapter besides its examples and the base: sizes, rates, and which rows a step sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.pace import WARMUP_STEPS, Pace
from loraweave.errors import InvalidTask, TrainingError
from loraweave.hub.whole_number import is_whole, require_whole
from loraweave.types import Task


@dataclass(frozen=True)
class Recipe:
    """The settings of a training. `alpha / rank` is the scale of an update, `warmup` a number of steps."""

    rank: int
    alpha: float
    steps: int
    lr: float
    batch_size: int
    target_modules: tuple[str, ...]
    seed: int
    warmup: int = WARMUP_STEPS
    linearized: bool = False

    @property
    def pace(self) -> Pace:
        """Its steps, whatever is trained in them."""
        return Pace(self.steps, self.lr, self.batch_size, self.seed, self.warmup)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.pace.rate(step)

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """The job's rows of one step."""
        return self.pace.rows(rows, job, step)


def require_trainable(recipe: Recipe, tasks: Mapping[str, Any], jobs_per_batch: int) -> dict[str, Task]:
    """The tasks, read. TrainingError for settings out of range and for tasks without examples, InvalidTask for no rows."""
    if not isinstance(tasks, Mapping) or not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    require_texts("task", tasks)
    require_steps(recipe.pace, jobs_per_batch)
    require_whole("rank", recipe.rank, 1, TrainingError)
    _require_positive("alpha", recipe.alpha)
    read = {}
    for name, given in tasks.items():
        try:
            read[name] = Task.of(given)
        except InvalidTask as error:
            raise InvalidTask(f"task {name!r}: {error}") from error
        if not read[name].examples:
            raise TrainingError(f"task {name!r} has no examples")
    return read


def require_steps(pace: Pace, jobs_per_batch: int) -> None:
    """TrainingError for numbers of steps, rows and jobs, and for rates, that are out of range."""
    counts = {"steps": (pace.steps, 1), "batch_size": (pace.batch_size, 1), "jobs_per_batch": (jobs_per_batch, 1)}
    for field, (value, least) in {**counts, "warmup": (pace.warmup, 0)}.items():
        require_whole(field, value, least, TrainingError)
    _require_positive("lr", pace.lr)


def require_memory(memory_bytes: Any) -> None:
    """TrainingError for what is no number of bytes, nor None."""
    if memory_bytes is not None and not is_whole(memory_bytes, 1):
        raise TrainingError(f"memory_bytes is {memory_bytes!r}; it must be None or a whole number of at least 1")


def require_texts(what: str, names: Iterable[Any]) -> None:
    """TrainingError for names that are no texts."""
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TrainingError(f"{what} {strange[0]!r} has no text for a name: name it by one")


def _require_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TrainingError(f"{field} is {value!r}; it must be a number")
    if not 0 < float(value) < math.inf:
        raise TrainingError(f"{field} is {value!r}; it must be above 0")
