"""The training of one adapter task after task, in one of several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraweave import Adapter, Task, TrainingError
from loraweave.extend import (
    Count,
    GivenRows,
    LoraSettings,
    Positive,
    Texts,
    Whole,
    check_options,
    checkpoint_folder,
    fingerprint,
    get,
    launched_processes,
    options_of,
    progress_bar,
    read_tasks,
    require_startable,
    target_layers,
    training_rows,
    untouched,
)
from loraweave.extensions.continual.course import Course


def train_in_order(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task | Texts | GivenRows],
    *,
    way: str,
    options: Mapping[str, Any] | None = None,
    rank: Count = 8,
    steps: Count = 60,
    jobs_per_batch: Count = 4,
    seed: int = 0,
    alpha: Positive | None = None,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    start: Mapping[str, Adapter] | None = None,
    warmup: Whole = LoraSettings.warmup,
    checkpoint: str | Path | None = None,
    progress: bool | Progress = True,
) -> dict[str, Adapter]:
    """Train the tasks one after the other; return {task name: Adapter}, in their order. The base stays as it is.

    A task's adapter is the whole model after it. `way` is one of `lw.names("continual")`, and `options` are its own
    (docs/extensions/continual.md); the others are those of `train_adapters`. Only the first task can have a `start`. With
    `checkpoint`, a folder, the same call goes on with the task that was interrupted.

    Raises UnknownName for an unknown way and for target modules without a layer, TrainingError for options and settings out
    of range, a list of tasks, launched processes, a checkpoint that cannot be written and a loss that is not finite; what
    `train_adapters` raises for examples and for a start that cannot be used.
    """
    way_options, begins = dict(options or {}), start or {}
    lora: dict[str, Any] = {"rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "warmup": warmup}
    known = options_of(train_in_order)
    check_options("train_in_order()", {**lora, "alpha": alpha, "jobs_per_batch": jobs_per_batch}, known, error=TrainingError)
    settings = LoraSettings.of(target_modules, alpha, **lora)
    prepared = read_tasks(tasks)
    train: Callable[..., dict[str, Adapter]] = get("continual", way)
    _require_sense(way, way_options, options_of(train, after=1), prepared, begins)
    begin = require_startable(model, tasks, begins).get(next(iter(prepared)))
    layers = target_layers(model, settings.target_modules)
    rows = {name: training_rows(model, tokenizer, parts, seed) for name, parts in prepared.items()}
    alone, base = {name: parts[0] for name, parts in prepared.items()}, fingerprint(model)
    with untouched(model), progress_bar(progress, field="loss") as bar:
        on = model, tokenizer, settings, bar, layers
        folder = checkpoint_folder(checkpoint)
        return train(Course(way, way_options, *on, alone, rows, begin, base, jobs_per_batch, folder), **way_options)


def _require_sense(
    way: str,
    options: Mapping[str, Any],
    known: Mapping[str, Any],
    tasks: Mapping[str, Sequence[Task | Texts]],
    start: Mapping[str, Adapter],
) -> None:
    """Raise TrainingError for options that the way does not take, lists of tasks, later starts, and launched processes."""
    if (count := launched_processes()) > 1:
        raise TrainingError(f"{count} processes were launched, but tasks are trained in order in one: start it alone")
    if several := [name for name, parts in tasks.items() if len(parts) > 1]:
        raise TrainingError(f"way={way!r} trains on one task at a time, and {several[0]!r} is a list of tasks")
    check_options(f"continual {way!r}", options, known, error=TrainingError)
    first = next(iter(tasks))
    if later := [name for name in start if name != first]:
        raise TrainingError(
            f"start has an adapter for task {later[0]!r}, but tasks that are learned one after the other begin once: "
            f"give the adapter to the first, {first!r}"
        )
