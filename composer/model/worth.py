"""The worth of each expert of a mixture or router: the rise of a loss when its weight is taken as 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from loraweave.common.display import progress_bar, tracked
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import TargetBatch, batch, mean_losses, untouched
from loraweave.errors import InvalidTask, ScopeError
from loraweave.routers.combined import masked, num_rows_of
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task

# opens a mixture in the model for the length of a block
Activate = Callable[[Any], AbstractContextManager[object]]

# rows of one forward pass, an example under one expert each
MAX_ROWS = 64


def leave_one_out(
    model: nn.Module,
    tokenizer: Any,
    activate: Activate,
    router: Router,
    names: Sequence[str],
    task: Task,
    *,
    renormalise: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Return {expert: rise of the mean loss of the task's examples, in nats, when its weight is 0}.

    `router` is resolved over the experts `names`. Raises ScopeError for a mixture of several rows.
    """
    names = router.experts if isinstance(router, MixtureWeights) else names
    num_rows = num_rows_of(router)
    if num_rows != 1:
        raise ScopeError(f"leave_one_out() takes one mixture for all examples, but this one has {num_rows} rows")
    rows = scoring.encode_pairs(model, tokenizer, task, task.examples)

    def mean_loss(mixture: Router) -> float:
        with untouched(model), activate(mixture):
            losses = scoring.losses_of_rows(model, tokenizer, rows)
        return sum(losses) / len(losses)

    whole = mean_loss(router)
    places = tracked(range(len(names)), "leaving experts out", total=len(names), shown=progress)
    return {names[at]: mean_loss(masked(router, at, renormalise=renormalise)) - whole for at in places}


@torch.no_grad()
def expert_losses(
    model: nn.Module,
    tokenizer: Any,
    activate: Activate,
    names: Sequence[str],
    tasks: Mapping[str, Task],
    *,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Return {task: {expert: loss}}: the mean over a task's examples of their target tokens' mean loss, that expert at 1.

    Raises InvalidTask for a task without examples that the model can read.
    """
    if empty := [name for name, task in tasks.items() if not task.examples]:
        raise InvalidTask(f"a task without examples, {empty[0]!r}, tells nothing about experts: give some")
    batches = {name: list(_batches(model, tokenizer, task)) for name, task in tasks.items()}
    table: dict[str, dict[str, float]] = {name: dict.fromkeys(names, 0.0) for name in tasks}
    with untouched(model), progress_bar(progress) as bar:
        shown = bar.add_task("measuring experts", total=len(names) * len(tasks))
        for name, task in tasks.items():
            for first in range(0, len(names), chunk := max(1, MAX_ROWS // len(task.examples))):
                some = names[first : first + chunk]
                for part in batches[name]:
                    num_rows = len(part.targets_BK)
                    with activate([{expert: 1.0} for expert in some for _ in range(num_rows)]):
                        losses_B = mean_losses(model, part.tile(len(some)))
                    sums_E = losses_B.view(len(some), num_rows).double().sum(dim=1)
                    for expert, total in zip(some, sums_E.tolist(), strict=True):
                        table[name][expert] += total / len(task.examples)
                bar.update(shown, advance=len(some))
    return table


def _batches(model: nn.Module, tokenizer: Any, task: Task) -> Iterator[TargetBatch]:
    rows = sorted(scoring.encode_pairs(model, tokenizer, task, task.examples), key=len)
    for start in range(0, len(rows), MAX_ROWS):
        yield batch(model, tokenizer, rows[start : start + MAX_ROWS])
