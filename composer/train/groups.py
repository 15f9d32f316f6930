"""The groups of jobs that share steps, each a piece of work for some worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.progress import Progress

from loraweave.common.spread import processes_here, require_all, spread
from loraweave.composer.train.jobs import PlannedJob
from loraweave.composer.train.memory import MemoryModel, step_budget
from loraweave.composer.train.report import SharedReport, TrainedAdapters
from loraweave.composer.train.schedule import groups
from loraweave.hub.adapter import Adapter
from loraweave.hub.base_reference import base_loader
from loraweave.hub.hub import Hub

# trains tasks by name, as `train_adapters` does
Train = Callable[..., TrainedAdapters]


@dataclass(frozen=True)
class Group:
    """A group of tasks trained together: {argument: {task name: value}} of `train`, and the key of what each depends on."""

    by_name: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]


def train_groups(
    train: Train,
    model: Any,
    tokenizer: Any,
    planned: Sequence[PlannedJob],
    keys: Mapping[str, str],
    by_name: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    hub: Hub | None,
    n_jobs: int | None,
    bar: Progress,
) -> TrainedAdapters:
    """Train each group by `train(model, tokenizer, tasks, **options)`, on any number of workers to the same bits.

    `by_name` has the arguments that are mappings of task names, "tasks" among them. With a hub the worker adds a group's
    adapters as one batch, which is there whole or not at all, and a group that is there under the same `keys` is not
    trained again. When all others have ended, raises what the first group that failed has raised.
    """
    largest = max(planned, key=lambda job: job.num_parameters)
    memory = MemoryModel.of(model, tokenizer, largest.make())
    budget = options["memory_bytes"]
    if budget is None and (budget := step_budget(memory, next(model.parameters()).device)) is not None:
        # as many processes of this machine do the same
        budget //= processes_here(n_jobs) or 1
    sizes = {job.name: job.size(model) for job in planned}
    together = groups(sizes, options["jobs_per_batch"], lambda jobs: budget is None or memory.peak(jobs) <= budget)
    pieces = {
        ", ".join(names): Group(
            {argument: {name: values[name] for name in names if name in values} for argument, values in by_name.items()},
            {name: keys[name] for name in names},
        )
        for names in together
    }
    group_options = {**options, "memory_bytes": budget, "progress": False}
    work = partial(_train_group, train, base_loader(model, tokenizer, n_jobs), group_options, hub)
    trained = list(require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="training", bar=bar))).values())
    adapters = {name: adapter for group_adapters in trained for name, adapter in group_adapters.items()}
    if hub is not None:
        adapters = {name: hub[name] for name in keys}
    return TrainedAdapters({name: adapters[name] for name in keys}, _report(trained, adapters))


def _train_group(
    train: Train,
    load: Callable[[], tuple[Any, Any]],
    options: Mapping[str, Any],
    hub: Hub | None,
    group: Group,
) -> TrainedAdapters:
    """Train a group; return its adapters, or none if the hub has them: they travel as its names."""
    if hub is not None and all(_is_there(hub, name, key) for name, key in group.keys.items()):
        return TrainedAdapters({}, SharedReport())
    model, tokenizer = load()
    trained = train(model, tokenizer, **group.by_name, **options)
    if hub is None:
        return trained
    added = hub.add_many([_with_key(adapter, group.keys[name]) for name, adapter in trained.items()])
    for _, error in added.refused:
        raise error
    return TrainedAdapters({}, trained.report)


def _with_key(adapter: Adapter, key: str) -> Adapter:
    return replace(adapter, card={**adapter.card, "recipe": {**adapter.card["recipe"], "key": key}})


def _is_there(hub: Hub, name: str, key: str) -> bool:
    """Return whether the hub has the adapter of that name, trained from the very same."""
    recipe = hub.record(name).card.get("recipe") if name in hub else None
    return isinstance(recipe, Mapping) and recipe.get("key") == key


def _report(trained: Sequence[TrainedAdapters], adapters: Mapping[str, Adapter]) -> SharedReport:
    """Return the report of all groups; counts and seconds are those of all workers together."""
    total = SharedReport()
    for report in [group_adapters.report for group_adapters in trained]:
        for count in ("num_tokens", "num_computed", "num_steps", "seconds"):
            setattr(total, count, getattr(total, count) + getattr(report, count))
        total.estimated_bytes = max(total.estimated_bytes, report.estimated_bytes)
        peaks = [peak for peak in (total.peak_bytes, report.peak_bytes) if peak is not None]
        total.peak_bytes = max(peaks, default=None)
    total.note_jobs(adapters)
    return total
