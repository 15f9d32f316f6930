"""A data set whose rows say whose they are, as the prompts of each name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave.routers.routing.labelled_tasks import labelled_tasks


def labelled_texts(dataset: Any) -> dict[str, list[str]]:
    """{name: prompts}, of what `labelled_tasks` takes, and of {name: texts}, which are prompts already; raises like that."""
    if isinstance(dataset, Mapping) and dataset and all(_are_texts(given) for given in dataset.values()):
        return {name: list(given) for name, given in dataset.items()}
    return {name: [task.prompt(text) for text, _ in task.examples] for name, task in labelled_tasks(dataset).items()}


def _are_texts(given: Any) -> bool:
    # an iterator would be spent by looking
    return isinstance(given, list | tuple) and all(isinstance(text, str) for text in given)
