"""Models that are prefixes: after task t the sum of the updates of tasks 0 to t."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loraweave.composer.continual._course import Course, Layers, added
from loraweave.hub.adapter import Adapter


def by_prefix(course: Course, learn: Callable[[str, Layers], Layers]) -> dict[str, Adapter]:
    """{task: the sum after it}; `learn(task, prefix)` gives the update that the task adds to the frozen prefix."""
    found: dict[str, Adapter] = {}
    prefix = course.first
    for name in course.rows:
        (found[name],) = course.once(name, partial(_extended, learn, name, prefix))
        prefix = found[name].layers
    return found


def _extended(learn: Callable[[str, Layers], Layers], name: str, prefix: Layers) -> list[Layers]:
    return [added(prefix, learn(name, prefix))]
