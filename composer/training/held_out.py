"""Rows that a job is not trained on, by whose loss it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from loraweave.composer.batches import EncodedRow, encode
from loraweave.composer.training.seeding import seeded
from loraweave.errors import TrainingError, UnknownName
from loraweave.hub.whole_number import is_whole, require_whole
from loraweave.types import Task


@dataclass(frozen=True)
class HeldOut:
    """`rows` are evaluated before the first step, for comparison, then after every `every` steps and after the last.

    With `patience`, the job ends when so many of the latter in a row have brought no lower loss.
    """

    rows: Sequence[EncodedRow]
    every: int
    patience: int | None = None


@dataclass(frozen=True)
class Judging:
    """What is asked for: a share of each task's examples, or examples of tasks by name, and when they are evaluated."""

    held_out: float | Mapping[str, Any] | None
    every: int
    patience: int | None

    def require(self, counts: Mapping[str, int]) -> None:
        """`counts` are those of the tasks' examples.

        TrainingError for what is out of range or misses its counterpart, UnknownName for rows of no task.
        """
        require_whole("evaluate_every", self.every, 1, TrainingError)
        if self.patience is not None and not is_whole(self.patience, 1):
            raise TrainingError(f"patience is {self.patience!r}; it must be None or a whole number of at least 1")
        if self.held_out is None:
            if self.patience is not None:
                raise TrainingError(
                    f"patience is {self.patience}, but nothing is held out to judge by; pass held_out=0.2, say"
                )
            return
        if isinstance(self.held_out, Mapping):
            if unknown := [name for name in self.held_out if name not in counts]:
                raise UnknownName(f"held_out has rows of {unknown[0]!r}, which is no task; there are {', '.join(counts)}")
            if strange := [name for name, rows in self.held_out.items() if isinstance(rows, int | float | None)]:
                raise TrainingError(
                    f"held_out of task {strange[0]!r} is {self.held_out[strange[0]]!r}; pass rows, (input, target) say"
                )
            if empty := [name for name, rows in self.held_out.items() if _is_empty(rows)]:
                raise TrainingError(f"held_out has no rows of task {empty[0]!r}; leave it out, or give it some")
        elif not _is_share(self.held_out):
            raise TrainingError(f"held_out is {self.held_out!r}; it must be a share above 0 and below 1, or rows by task")
        elif alone := [name for name, count in counts.items() if count < 2]:
            raise TrainingError(
                f"task {alone[0]!r} has one example, of which no share can be held out; pass rows as held_out={{name: rows}}"
            )

    def parted(
        self, rows: Mapping[str, Sequence[EncodedRow]], read: Callable[[str, Any], Sequence[EncodedRow]], seed: int
    ) -> tuple[Mapping[str, Sequence[EncodedRow]], dict[str, HeldOut]]:
        """(rows to train on, rows to judge by) of each task, those without the latter left out of the second.

        `read` makes rows of the examples of a task, by its name, that are to be judged by.
        """
        if self.held_out is None:
            return rows, {}
        if isinstance(self.held_out, Mapping):
            judged = {name: read(name, examples) for name, examples in self.held_out.items()}
        else:
            both = {name: _split(name, own, self.held_out, seed) for name, own in rows.items()}
            rows, judged = ({name: pair[part] for name, pair in both.items()} for part in (0, 1))
        return rows, {name: HeldOut(own, self.every, self.patience) for name, own in judged.items()}


def _is_empty(rows: Any) -> bool:
    given = rows.examples if isinstance(rows, Task) else rows
    return isinstance(given, Sized) and not len(given)


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < 1


def encoded_task(model: Any, tokenizer: Any, task: Task) -> list[EncodedRow]:
    """The examples of a task in token ids, each in the task's prompt."""
    prompts = [task.prompt(text) for text, _ in task.examples]
    return encode(model, tokenizer, prompts, [target for _, target in task.examples])


def _split(
    name: str, rows: Sequence[EncodedRow], share: float, seed: int
) -> tuple[Sequence[EncodedRow], Sequence[EncodedRow]]:
    """(those to train on, those held out), at least one of each, by the seed and the name."""
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    chosen = set(torch.randperm(len(rows), generator=seeded(seed, name, "held out")).tolist()[:count])
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in sorted(chosen)]
