"""Plain sequential LoRA: one adapter that every task goes on training. The baseline of forgetting."""

from __future__ import annotations

from loraweave.composer.train.ordered._course import Course, Layers
from loraweave.composer.train.ordered._one_by_one import one_by_one
from loraweave.hub.adapter import Adapter


def sequential(course: Course) -> dict[str, Adapter]:
    """{task: the adapter after that task}. Nothing holds what earlier tasks taught."""
    return one_by_one(course, lambda name, layers: _learn(course, name, layers))


def _learn(course: Course, name: str, layers: Layers) -> Layers:
    jobs = course.jobs([name], layers or None)
    course.training.run(jobs, course.plain(jobs, {}))
    return jobs.layers_of(name)
