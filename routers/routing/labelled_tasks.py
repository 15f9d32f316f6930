"""A data set whose rows say whose they are, as one task for each name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraweave.errors import InvalidTask
from loraweave.routers.routing.row_texts import row_texts
from loraweave.types import Task

FORM = "rows are pairs (input, target), or {'input' or 'prompt', 'target'} with 'instruction' and 'expert' where known"


def labelled_tasks(dataset: Any) -> dict[str, Task]:
    """{name: task} of {name: Task or rows}, or of rows that each name their 'expert'.

    A row is a pair (input, target), or {"input", "target"} with an "instruction" if any, or {"prompt", "target"}, as for
    `Composer.fit`. Raises InvalidTask for rows of another form, for rows that name no expert and for names without any.
    """
    grouped: Mapping[str, Any] = dataset if isinstance(dataset, Mapping) else _by_expert(dataset)
    if not grouped:
        raise InvalidTask("the data set is empty: give {name: [(input, target), ...]}")
    tasks = {name: given if isinstance(given, Task) else _task(name, given) for name, given in grouped.items()}
    for name, task in tasks.items():
        if not task.examples:
            raise InvalidTask(f"the data set has no examples of {name!r}: give some, or leave the name out")
    return tasks


def _task(name: str, rows: Any) -> Task:
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise InvalidTask(f"the data set has {rows!r:.80} for {name!r}, which are no rows: {FORM}")
    plain = Task(())
    pairs = [row_texts(row, plain, where=f"row {n} of {name!r}", forms=FORM) for n, row in enumerate(rows, start=1)]
    return Task(pairs, template="{input}")


def _by_expert(rows: Any) -> dict[str, list[Any]]:
    grouped: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not row.get("expert"):
            raise InvalidTask(
                f"row {number} of the data set, {row!r:.80}, names no expert, and this router learns which expert answers "
                "what: give each row an 'expert', or {expert: rows}"
            )
        grouped.setdefault(row["expert"], []).append(row)
    return grouped
