"""Tasks that come one after the other, each over what the one before it left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loraweave.composer.train.ordered._course import Course, Layers, added
from loraweave.hub.adapter import Adapter

# what a task makes of the layers that the one before it left
Step = Callable[[str, Layers], Layers]


def one_by_one(course: Course, step: Step) -> dict[str, Adapter]:
    """{task: the adapter after it}; `step(task, layers)` gives its layers, from those after the task before."""
    found: dict[str, Adapter] = {}
    layers = course.first
    for name in course.rows:
        (found[name],) = course.once(name, partial(_alone, step, name, layers))
        layers = found[name].layers
    return found


def by_prefix(course: Course, learn: Step) -> dict[str, Adapter]:
    """{task: the sum after it}; `learn(task, prefix)` gives the update that the task adds to the frozen prefix."""
    return one_by_one(course, lambda name, prefix: added(prefix, learn(name, prefix)))


def _alone(step: Step, name: str, layers: Layers) -> list[Layers]:
    return [step(name, layers)]
