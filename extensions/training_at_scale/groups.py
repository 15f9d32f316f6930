"""Training in groups of tasks: one call for each group, by workers, with the adapters stored in a hub."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from loraweave import Hub, train_adapters
from loraweave.extend import processes_here, require_all, spread
from loraweave.extend.models import base_loader
from loraweave.extend.training import Apart, Judging, SharedReport, TrainedAdapters

# a group: its arguments of train_adapters by task, and for each adapter the key of all that it depends on
Group = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, str]]


def train_in_groups(apart: Apart, judging: Judging, hub: Hub | None, n_jobs: int | None) -> TrainedAdapters:
    """Train the jobs in groups, one call for each, here or by workers; the number of workers never changes a bit.

    With a hub, the worker adds all adapters of a group as one batch or none, and a group whose adapters are already there
    under the same keys is not trained again. Once all groups have ended, raises the error of the first that failed.
    """
    shared, keys = apart.shared, {name: apart.key(name) for name in apart.tasks}
    # the number of processes that share this machine's free memory
    together, budget = apart.groups(processes_here(n_jobs) or 1)
    by_name: dict[str, Mapping[str, Any]] = {"tasks": apart.tasks, "start": apart.begins}
    options = {
        **{name: value for name, value in asdict(apart.settings).items() if name != "linearized"},
        "kind": apart.kind,
        "jobs_per_batch": shared.jobs_per_batch,
        "memory_bytes": budget,
        "evaluate_every": judging.every,
        "patience": judging.patience,
        "checkpoint": shared.folder,
        "progress": False,
    }
    if isinstance(judging.held_out, Mapping):
        by_name["held_out"] = judging.held_out
    else:
        options["held_out"] = judging.held_out
    pieces: dict[str, Group] = {}
    for names in together:
        values = {option: {name: of[name] for name in names if name in of} for option, of in by_name.items()}
        pieces[", ".join(names)] = values, {name: keys[name] for name in names}
    work = partial(_train_group, base_loader(shared.model, shared.tokenizer, n_jobs), options, hub)
    spread_groups = spread(work, pieces, n_jobs=n_jobs, label="training", bar=shared.bar)
    trained = list(require_all(dict(spread_groups)).values())
    by_task = hub if hub is not None else {name: adapter for group in trained for name, adapter in group.items()}
    adapters = {name: by_task[name] for name in keys}
    report = _sum([group.report for group in trained])
    report.note_jobs(adapters)
    return TrainedAdapters(adapters, report)


def _train_group(
    load: Callable[[], tuple[Any, Any]], options: Mapping[str, Any], hub: Hub | None, group: Group
) -> TrainedAdapters:
    """Train a group and return its adapters; return none if they are in the hub, where the caller reads them by name."""
    by_name, keys = group
    if hub is not None and all(_is_there(hub, name, key) for name, key in keys.items()):
        return TrainedAdapters({}, SharedReport())
    model, tokenizer = load()
    arguments: dict[str, Any] = {**by_name, **options}
    trained = train_adapters(model, tokenizer, **arguments)
    if hub is None:
        return trained
    recipes = {name: {**adapter.card["recipe"], "key": keys[name]} for name, adapter in trained.items()}
    keyed = [replace(adapter, card={**adapter.card, "recipe": recipes[name]}) for name, adapter in trained.items()]
    for _, error in hub.add_many(keyed).refused:
        raise error
    return TrainedAdapters({}, trained.report)


def _is_there(hub: Hub, name: str, key: str) -> bool:
    """Return True if the hub has an adapter of that name that was trained with the same key."""
    recipe = hub.record(name).card.get("recipe") if name in hub else None
    return isinstance(recipe, Mapping) and recipe.get("key") == key


def _sum(reports: Sequence[SharedReport]) -> SharedReport:
    """Return a report with the sums of the reports' counts and the largest of their bytes; it lists no jobs."""
    total = SharedReport()
    for report in reports:
        for count in ("num_tokens", "num_computed", "num_steps", "seconds"):
            setattr(total, count, getattr(total, count) + getattr(report, count))
    total.estimated_bytes = max((report.estimated_bytes for report in reports), default=0)
    total.peak_bytes = max((report.peak_bytes for report in reports if report.peak_bytes is not None), default=None)
    return total
