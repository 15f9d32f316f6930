"""A data set whose rows say whose they are, as one task for each name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave.errors import InvalidTask
from loraweave.types import Task


def labelled_tasks(dataset: Any) -> dict[str, Task]:
    """{name: task} of {name: Task or (input, target) pairs}, or of rows {"input", "target", "expert"}.

    Raises InvalidTask for rows of another form, for rows that name no expert and for names without any.
    """
    grouped: Mapping[str, Any] = dataset if isinstance(dataset, Mapping) else _by_expert(dataset)
    if not grouped:
        raise InvalidTask("the data set is empty: give {name: [(input, target), ...]}")
    tasks = {name: given if isinstance(given, Task) else Task(list(given)) for name, given in grouped.items()}
    for name, task in tasks.items():
        if not task.examples:
            raise InvalidTask(f"the data set has no examples of {name!r}: give some, or leave the name out")
    return tasks


def _by_expert(rows: Any) -> dict[str, list[tuple[str, str]]]:
    grouped: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not {"input", "target"} <= row.keys():
            raise InvalidTask(
                f"row {number} of the data set is {row!r:.80}; it is a mapping with 'input', 'target' and 'expert'"
            )
        if not row.get("expert"):
            raise InvalidTask(
                f"row {number} of the data set names no expert, and this router learns which expert answers what: give each "
                "row an 'expert', or {expert: [(input, target), ...]}"
            )
        grouped.setdefault(row["expert"], []).append((row["input"], row["target"]))
    return grouped
