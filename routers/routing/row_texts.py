"""The texts of one row of a data set, in whichever form it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.errors import InvalidTask
from loraweave.types import Task


def row_texts(row: Any, task: Task, *, where: str, forms: str) -> tuple[str, str]:
    """(prompt, target) of a pair (input, target), of {"input", "target"} with an "instruction" of its own if any, or of
    {"prompt", "target"} with the whole prompt.

    `task` has the template and the instruction of rows that have none. `where` the row is, and what `forms` there are, is
    for messages. Raises InvalidTask for a row of another form, or without a target.
    """
    if not isinstance(row, Mapping):
        text, target = _pair(row, where, forms)
        return task.prompt(text), target
    given = "prompt" if "prompt" in row else "input"
    if missing := [name for name in (given, "target") if name not in row]:
        raise InvalidTask(f"{where} has {sorted(map(str, row))}, and no {' and no '.join(map(repr, missing))}: {forms}")
    text, target = _pair((row[given], row["target"]), where, forms)
    if given == "prompt":
        return text, target
    instruction = row.get("instruction") or task.instruction
    return Task((), instruction=instruction, template=task.template).prompt(text), target


def _pair(row: Any, where: str, forms: str) -> tuple[str, str]:
    # a text of two letters is no pair
    is_pair = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2
    if not is_pair or not all(isinstance(text, str) for text in row):
        raise InvalidTask(f"{where} is {row!r:.80}: {forms}")
    if not row[1].strip():
        raise InvalidTask(f"{where} (input {row[0]!r:.60}) has an empty target; there is nothing to learn from it")
    return row[0], row[1]
