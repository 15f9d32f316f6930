"""The loss of each expert alone on the examples of tasks: what `lorauter` knows of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from loraweave import Composer, CompositionError, InvalidTask, Task
from loraweave.extend import GivenRows, TargetBatch, batch, encode_pairs, mean_losses, progress_bar, untouched

# rows of one forward pass, an example under one expert each
MAX_ROWS = 64


@torch.no_grad()
def expert_losses(
    engine: Composer, tasks: Mapping[str, Task | GivenRows], *, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Return {task: {expert: loss}}: the mean over a task's examples of their target tokens' mean loss, that expert at 1.

    Raises CompositionError for an engine without a tokenizer, InvalidTask for a task without examples or with those that the
    model cannot read, AlreadyActive while a mixture is fused.
    """
    model, tokenizer, names = engine.model, engine.tokenizer, engine.pool.names
    if tokenizer is None:
        raise CompositionError("expert_losses() needs a tokenizer: make the Composer with tokenizer=...")
    task_by_name = {name: Task.of(task) for name, task in tasks.items()}
    if empty := [name for name, task in task_by_name.items() if not task.examples]:
        raise InvalidTask(f"a task without examples, {empty[0]!r}, tells nothing about experts: give some")
    batches = {name: list(_batches(model, tokenizer, task)) for name, task in task_by_name.items()}
    table: dict[str, dict[str, float]] = {name: dict.fromkeys(names, 0.0) for name in task_by_name}
    with untouched(model), progress_bar(progress) as bar:
        shown = bar.add_task("measuring experts", total=len(names) * len(batches))
        for name, task in task_by_name.items():
            for first in range(0, len(names), chunk := max(1, MAX_ROWS // len(task.examples))):
                some = names[first : first + chunk]
                for part in batches[name]:
                    num_rows = len(part.targets_BK)
                    with engine.activate([{expert: 1.0} for expert in some for _ in range(num_rows)]):
                        losses_B = mean_losses(model, part.tile(len(some)))
                    sums_E = losses_B.view(len(some), num_rows).double().sum(dim=1)
                    for expert, total in zip(some, sums_E.tolist(), strict=True):
                        table[name][expert] += total / len(task.examples)
                bar.update(shown, advance=len(some))
    return table


def _batches(model: Any, tokenizer: Any, task: Task) -> Iterator[TargetBatch]:
    rows = sorted(encode_pairs(model, tokenizer, task, task.examples), key=len)
    for start in range(0, len(rows), MAX_ROWS):
        yield batch(model, tokenizer, rows[start : start + MAX_ROWS])
