"""A data set whose rows say whose they are, as one task for each name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraweave.common.rows import located, read_row
from loraweave.errors import InvalidTask
from loraweave.types import Task


def labelled_tasks(dataset: Any) -> dict[str, Task]:
    """{name: task} of {name: Task or rows}, or of rows that each name their 'expert'.

    Rows are of any form of `loraweave.common.rows`, with an instruction of their own if any; a "prompt" is the whole prompt.
    Raises InvalidTask for rows of another form, for rows that name no expert and for names without any.
    """
    if isinstance(dataset, Mapping):
        tasks = {
            name: given if isinstance(given, Task) else _task(located(given, of=repr(name)))
            for name, given in dataset.items()
        }
    else:
        tasks = {name: _task(rows) for name, rows in _by_expert(dataset).items()}
    if not tasks:
        raise InvalidTask("the data set is empty: give {name: [(input, target), ...]}")
    for name, task in tasks.items():
        if not task.examples:
            raise InvalidTask(f"the data set has no examples of {name!r}: give some, or leave the name out")
    return tasks


def _task(rows: Iterable[tuple[str, Any]]) -> Task:
    """Of rows and where they are: prompts are the inputs."""
    plain = Task(())
    read = [read_row(row, where) for where, row in rows]
    return Task([(plain.prompt_of(row), row.targets[0]) for row in read], template="{input}")


def _by_expert(dataset: Any) -> dict[str, list[tuple[str, Any]]]:
    grouped: dict[str, list[tuple[str, Any]]] = {}
    for where, row in located(dataset, of="the data set"):
        if not isinstance(row, Mapping) or not row.get("expert"):
            raise InvalidTask(
                f"{where}, {row!r:.80}, names no expert, and this router learns which expert answers what: give each row an "
                "'expert', or {expert: rows}"
            )
        grouped.setdefault(row["expert"], []).append((where, row))
    return grouped
