"""Trains tasks one after the other, in one of the ways of `composer/continual/`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from loraweave import registry
from loraweave.composer.continual._course import Course
from loraweave.errors import TrainingError
from loraweave.hub.adapter import Adapter


def require_way(way: str, options: Mapping[str, Any], tasks: Mapping[str, Any], start: Mapping[str, Adapter]) -> None:
    """UnknownName for a way that is none; TrainingError for an option it does not have, and for a start of a later task."""
    known = _options(way)
    for option in options:
        if option not in known:
            hint = registry.nearest(option, known)
            raise TrainingError(f"continual {way!r} has no option {option!r}{hint}; it has {', '.join(known) or 'none'}")
    first = next(iter(tasks))
    if later := [name for name in start if name != first]:
        raise TrainingError(
            f"start has an adapter for task {later[0]!r}, but tasks that are learned one after the other begin once: "
            f"give the adapter to the first, {first!r}"
        )


def train_in_order(course: Course) -> dict[str, Adapter]:
    """{task: the adapter after that task}."""
    return cast(dict[str, Adapter], registry.get("continual", course.way)(course, **course.settings))


def _options(way: str) -> list[str]:
    return list(inspect.signature(registry.get("continual", way)).parameters)[1:]
