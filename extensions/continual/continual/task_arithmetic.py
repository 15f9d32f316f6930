"""Task arithmetic for continual learning: an adapter for each task from the same base, summed (Chitale et al. 2023)."""

from dataclasses import replace
from functools import partial
from typing import Annotated

import torch

from loraweave import Adapter, TrainingError
from loraweave.extend import Range, Whole, algebra
from loraweave.extend.scoring import EncodedRow
from loraweave.extend.training import seeded
from loraweave.extensions.continual.course import Course, Layers, added


def task_arithmetic(
    course: Course, *, weight: Annotated[float, Range(least=0, most=2)] = 0.5, exemplars: Whole = 0, tuning_steps: Whole = 0
) -> dict[str, Adapter]:
    """Return {task t: weight * the sum of the adapters of tasks 0 to t}, each trained without the others (arXiv 2311.02428).

    The order of tasks does not change the last model, and tasks are trained `jobs_per_batch` at once. With `tuning_steps`,
    each sum is then tuned so many steps on `exemplars` examples of every task in it. With `weight` 0 the model stays
    that before the first task. Ranks add up.
    """
    if tuning_steps and not exemplars:
        raise TrainingError(f"tuning_steps is {tuning_steps}, but exemplars is 0: give at least 1 example of each task")
    names = list(course.rows)
    adapters: dict[str, Adapter] = {}
    total = course.first
    for first in range(0, len(names), course.jobs_per_batch):
        group = names[first : first + course.jobs_per_batch]
        kinds = [f"own update of {name}" for name in group]
        for name, update in zip(group, course.once(group[-1], partial(_learn, course, group), kinds), strict=True):
            total = added(total, {layer: algebra.scale(factors, weight) for layer, factors in update.layers.items()})
            (adapters[name],) = course.once(name, partial(_tuned, course, name, total, exemplars, tuning_steps))
    return adapters


def _learn(course: Course, group: list[str]) -> list[Layers]:
    jobs = course.jobs(group)
    course.run(jobs, course.plain(jobs, course.first))
    return [jobs.layers_of(name) for name in group]


def _tuned(course: Course, name: str, total: Layers, exemplars: int, steps: int) -> list[Layers]:
    """Return the sum, tuned for a few steps on exemplars of the tasks up to `name`."""
    if not steps:
        return [total]
    rows: list[EncodedRow] = []
    for task in list(course.rows)[: list(course.rows).index(name) + 1]:
        order = torch.randperm(len(course.rows[task]), generator=seeded(course.settings.seed, task, "exemplars"))
        rows += [course.rows[task][place] for place in order[:exemplars].tolist()]
    tuned = replace(course, settings=replace(course.settings, steps=steps), rows={name: rows})
    return [tuned.learned(name, start=total)]
