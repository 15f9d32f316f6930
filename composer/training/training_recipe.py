"""What determines a trained adapter besides its examples and the base: sizes, rates, and which rows a step sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.seeding import seeded
from loraweave.errors import TrainingError
from loraweave.types import Task

WARMUP_STEPS = 10


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

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """The job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
        chosen = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(place, len(rows))
            order = torch.randperm(len(rows), generator=seeded(self.seed, job, epoch))
            chosen.append(rows[int(order[offset])])
        return chosen


def require_trainable(recipe: Recipe, tasks: Mapping[str, Any], jobs_per_batch: int) -> None:
    """TrainingError for settings out of range and for tasks without examples."""
    if not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    counts = {"rank": recipe.rank, "steps": recipe.steps, "batch_size": recipe.batch_size, "jobs_per_batch": jobs_per_batch}
    for field, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise TrainingError(f"{field} is {value!r}; it must be a whole number of at least 1")
    if not isinstance(recipe.warmup, int) or recipe.warmup < 0:
        raise TrainingError(f"warmup is {recipe.warmup!r}; it must be a whole number of at least 0")
    for field, rate in {"lr": recipe.lr, "alpha": recipe.alpha}.items():
        if not rate > 0 or not math.isfinite(rate):
            raise TrainingError(f"{field} is {rate!r}; it must be above 0")
    for name, task in tasks.items():
        if not (task.examples if isinstance(task, Task) else task):
            raise TrainingError(f"task {name!r} has no examples")
