"""Task arithmetic for continual learning: an adapter for each task from the same base, summed (Chitale et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from loraweave.common.checks import require_whole
from loraweave.common.randomness import seeded
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.ordered._course import Course, Layers, added, require_within
from loraweave.composer.train.passes import job_losses
from loraweave.errors import TrainingError
from loraweave.hub.adapter import Adapter
from loraweave.lowrank import algebra


def task_arithmetic(course: Course, *, weight: float = 0.5, exemplars: int = 0, tuning_steps: int = 0) -> dict[str, Adapter]:
    """{task t: weight * the sum of the adapters of tasks 0 to t}, each trained without the others (arXiv 2311.02428).

    The order of tasks does not change the last model, and tasks are trained `jobs_per_batch` at once. With `tuning_steps`,
    each sum is then tuned so many steps on `exemplars` examples of every task in it. `weight` is in [0, 2]; 0 is the model
    before the first task. Ranks add up.
    """
    require_within("weight", weight, 0.0, 2.0)
    require_whole("tuning_steps", tuning_steps, 0, TrainingError)
    require_whole("exemplars", exemplars, 1 if tuning_steps else 0, TrainingError)
    names = list(course.rows)
    found: dict[str, Adapter] = {}
    total = course.first
    for first in range(0, len(names), course.jobs_per_batch):
        group = names[first : first + course.jobs_per_batch]
        kinds = [f"own update of {name}" for name in group]
        for name, own in zip(group, course.once(group[-1], partial(_learn, course, group), kinds), strict=True):
            total = added(total, {layer: algebra.scale(factors, weight) for layer, factors in own.layers.items()})
            (found[name],) = course.once(name, partial(_tuned, course, name, total, exemplars, tuning_steps))
    return found


def _learn(course: Course, group: list[str]) -> list[Layers]:
    jobs = course.jobs(group)
    course.training.run(jobs, course.plain(jobs, course.first))
    return [jobs.layers_of(name) for name in group]


def _tuned(course: Course, name: str, total: Layers, exemplars: int, steps: int) -> list[Layers]:
    """The sum after a few steps on exemplars of the tasks up to `name`."""
    if not steps:
        return [total]
    training = replace(course.training, recipe=replace(course.training.recipe, steps=steps))
    known = list(course.rows)[: list(course.rows).index(name) + 1]
    rows = [row for task in known for row in _drawn(course, task, exemplars)]
    jobs = course.jobs([name], total)

    def losses(step: int) -> Tensor:
        with jobs:
            return job_losses(training.model, training.tokenizer, training.recipe.rows(rows, name, step), 1)

    training.run(jobs, losses)
    return [jobs.layers_of(name)]


def _drawn(course: Course, task: str, count: int) -> list[EncodedRow]:
    order = torch.randperm(len(course.rows[task]), generator=seeded(course.training.recipe.seed, task, "exemplars"))
    return [course.rows[task][int(index)] for index in order[:count]]
