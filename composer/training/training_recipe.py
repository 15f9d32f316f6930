"""What determines a trained adapter besides its examples and the base: sizes, rates, and which rows a step sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.pace import WARMUP_STEPS, Pace
from loraweave.errors import TrainingError
from loraweave.hub.whole_number import require_whole
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


def require_trainable(recipe: Recipe, tasks: Mapping[str, Any], jobs_per_batch: int) -> None:
    """TrainingError for settings out of range and for tasks without examples."""
    if not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    require_steps(recipe.pace, jobs_per_batch)
    require_whole("rank", recipe.rank, 1, TrainingError)
    _require_positive("alpha", recipe.alpha)
    for name, task in tasks.items():
        if not (task.examples if isinstance(task, Task) else task):
            raise TrainingError(f"task {name!r} has no examples")


def require_steps(pace: Pace, jobs_per_batch: int) -> None:
    """TrainingError for numbers of steps, rows and jobs, and for rates, that are out of range."""
    counts = {"steps": (pace.steps, 1), "batch_size": (pace.batch_size, 1), "jobs_per_batch": (jobs_per_batch, 1)}
    for field, (value, least) in {**counts, "warmup": (pace.warmup, 0)}.items():
        require_whole(field, value, least, TrainingError)
    _require_positive("lr", pace.lr)


def _require_positive(field: str, value: float) -> None:
    if not value > 0 or not math.isfinite(value):
        raise TrainingError(f"{field} is {value!r}; it must be above 0")
