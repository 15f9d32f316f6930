"""What each expert of a mixture or of a router is worth: the rise of a loss when its weight is taken as 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loraweave.common.display import progress_bar, tracked
from loraweave.common.rows import GivenRows
from loraweave.composer.live.resolve import resolve
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import EncodedRow, TargetBatch, batch, encode, mean_losses, untouched
from loraweave.errors import CompositionError, InvalidTask, ScopeError
from loraweave.routers.combined import ByRow, masked
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task

if TYPE_CHECKING:
    from loraweave.composer.composer import Composer


def leave_one_out(
    engine: Composer, task: Task | GivenRows, mixture: Any, *, renormalise: bool = False, progress: bool = False
) -> dict[str, float]:
    """{expert: rise of the mean loss of the task's examples without it}; what `Composer.leave_one_out` says."""
    if engine.tokenizer is None:
        raise CompositionError("leave_one_out() needs a tokenizer: make the Composer with tokenizer=...")
    router = resolve(mixture, engine.pool, engine.bound_pool)
    names, num_rows = engine.pool.names, 1
    if isinstance(router, MixtureWeights):
        names, num_rows = router.experts, router.values_BTLE.shape[0]
    elif isinstance(router, ByRow):
        num_rows = router.num_rows
    if num_rows != 1:
        raise ScopeError(f"leave_one_out() takes one mixture for all examples, but this one has {num_rows} rows")
    task = Task.of(task)
    rows = scoring.encoded(engine.model, engine.tokenizer, task, task.examples)
    whole = _mean_loss(engine, rows, router)
    places = tracked(range(len(names)), "leaving experts out", total=len(names), shown=progress)
    return {names[at]: _mean_loss(engine, rows, masked(router, at, renormalise=renormalise)) - whole for at in places}


def _mean_loss(engine: Composer, rows: Sequence[EncodedRow], router: Router) -> float:
    with untouched(engine.model), engine.activate(router):
        losses = scoring.losses_of_rows(engine.model, engine.tokenizer, rows)
    return sum(losses) / len(losses)


# rows of one forward pass, an example under one expert each
MAX_ROWS = 64


@torch.no_grad()
def expert_losses(
    engine: Composer, given: Mapping[str, Task | GivenRows], *, progress: bool = True
) -> dict[str, dict[str, float]]:
    """{task: {expert: loss}}: the mean over a task's examples of the mean loss of their target tokens, that expert at 1.

    Raises CompositionError without a tokenizer, InvalidTask for a task without examples that the model can read.
    """
    if engine.tokenizer is None:
        raise CompositionError("experts are measured on texts: make the Composer with tokenizer=...")
    tasks = {name: Task.of(task) for name, task in given.items()}
    if empty := [name for name, task in tasks.items() if not task.examples]:
        raise InvalidTask(f"a task without examples, {empty[0]!r}, tells nothing about experts: give some")
    names = engine.pool.names
    batches = {name: list(_batches(engine, task)) for name, task in tasks.items()}
    table: dict[str, dict[str, float]] = {name: dict.fromkeys(names, 0.0) for name in tasks}
    with untouched(engine.model), progress_bar(progress) as bar:
        shown = bar.add_task("measuring experts", total=len(names) * len(tasks))
        for name, task in tasks.items():
            for first in range(0, len(names), chunk := max(1, MAX_ROWS // len(task.examples))):
                some = names[first : first + chunk]
                for part in batches[name]:
                    for expert, total in zip(some, _sums(engine, part, some), strict=True):
                        table[name][expert] += total / len(task.examples)
                bar.update(shown, advance=len(some))
    return table


def _batches(engine: Composer, task: Task) -> Iterator[TargetBatch]:
    prompts, targets = zip(*((task.prompt(text), target) for text, target in task.examples), strict=True)
    rows = sorted(encode(engine.model, engine.tokenizer, prompts, targets), key=len)
    for start in range(0, len(rows), MAX_ROWS):
        yield batch(engine.model, engine.tokenizer, rows[start : start + MAX_ROWS])


def _sums(engine: Composer, part: TargetBatch, experts: tuple[str, ...]) -> list[float]:
    """The summed loss of a batch's rows, for each of some experts."""
    num_rows = len(part.targets_BK)
    with engine.activate([{expert: 1.0} for expert in experts for _ in range(num_rows)]):
        losses_B = mean_losses(engine.model, part.tiled(len(experts)))
    sums: list[float] = losses_B.view(len(experts), num_rows).double().sum(dim=1).tolist()
    return sums
