"""Plain sequential LoRA: one adapter that every task goes on training. The baseline of forgetting."""

from __future__ import annotations

from functools import partial

from loraweave.composer.continual._course import Course, Layers
from loraweave.hub.adapter import Adapter


def sequential(course: Course) -> dict[str, Adapter]:
    """{task: the adapter after that task}. Nothing holds what earlier tasks taught."""
    found: dict[str, Adapter] = {}
    layers = course.first
    for name in course.rows:
        (found[name],) = course.once(name, partial(_learn, course, name, layers))
        layers = found[name].layers
    return found


def _learn(course: Course, name: str, layers: Layers) -> list[Layers]:
    jobs = course.jobs([name], layers or None)
    course.training.run(jobs, course.plain(jobs, {}))
    return [jobs.layers_of(name)]
