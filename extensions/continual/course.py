"""The training of one adapter task after task, and the parts that all ways of doing it share."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from loraweave import Adapter, Factors, Fingerprint, LayerMismatch, Task, TrainingError
from loraweave.extend import (
    Count,
    GivenRows,
    Positive,
    Whole,
    algebra,
    check_options,
    fingerprint,
    get,
    options_of,
    progress_bar,
    text_digest,
)
from loraweave.extend.scoring import EncodedRow, encode_pairs, untouched
from loraweave.extend.training import (
    Descent,
    LoraJobs,
    LoraSettings,
    Texts,
    checkpoint_folder,
    descend,
    job_losses,
    launched_processes,
    load_adapter,
    read_tasks,
    require_startable,
    save_adapter,
    target_layers,
    training_rows,
)

Layers = Mapping[str, Factors]
# loss_J of one step, by its number
Losses = Callable[[int], Tensor]


@dataclass(frozen=True)
class Course:
    """A course of `tasks` in the order in which they are learned; `start` is the adapter that the first task begins from.

    `layers` has (O, I) of each target layer, `options` are those of this `way` of training. Updates made by `once` are kept
    in `folder`, the checkpoint, if there is one.
    """

    way: str
    options: Mapping[str, Any]
    model: Any
    tokenizer: Any
    settings: LoraSettings
    bar: Progress
    layers: Mapping[str, tuple[int, int]]
    tasks: Mapping[str, Task | Texts]
    rows: Mapping[str, Sequence[EncodedRow]]
    start: Adapter | None
    base: Fingerprint
    jobs_per_batch: int
    folder: Path | None

    @property
    def first(self) -> Layers:
        """The update, {layer: factors}, that the model has before the first task; {} without a start."""
        return {} if self.start is None else self.start.layers

    def jobs(self, names: Sequence[str], start: Layers | None = None) -> LoraJobs:
        """Return a job for each of `names`, with new factors, or with copies of those in `start`."""
        starts = {} if start is None else dict.fromkeys(names, start)
        return LoraJobs(self.model, self.layers, names, self.settings, starts)

    @contextmanager
    def frozen(self, layers: Layers) -> Iterator[None]:
        """Add an update, {layer: its factors}, to the model inside the block, without training it."""
        if not layers:
            yield
            return
        held = LoraJobs(self.model, {}, [""], replace(self.settings, rank=1, alpha=1.0), {"": layers})
        for tensor in held.parameters():
            tensor.requires_grad_(False)
        with held:
            yield

    def plain(self, jobs: LoraJobs, frozen: Layers) -> Losses:
        """Return the function step -> each job's loss on that step's rows of its task, with the update `frozen` added."""

        def losses(step: int) -> Tensor:
            chosen = [row for job in jobs.jobs for row in self.settings.rows(self.rows[job], job, step)]
            with self.frozen(frozen), jobs:
                return job_losses(self.model, self.tokenizer, chosen, len(jobs.jobs))

        return losses

    def run(self, jobs: LoraJobs, losses: Losses, *, after_step: Callable[[int], None] | None = None) -> None:
        """Take all training steps down the gradient of `losses(step)`, clipped to norm 1 for each job.

        Raises TrainingError for a loss that is not finite.
        """
        learners = {f"job {job.name!r}": Descent(job.parameters(), self.settings.rate) for job in jobs.members}
        descend(learners, losses, self.settings.steps, self.bar, title=", ".join(jobs.jobs), after_step=after_step)

    def learned(self, name: str, start: Layers | None = None, frozen: Layers | None = None) -> Layers:
        """Train a job on task `name` alone, from new factors or `start`, with `frozen` added; return {layer: factors}."""
        jobs = self.jobs([name], start)
        self.run(jobs, self.plain(jobs, frozen or {}))
        return jobs.layers_of(name)

    def encoded(self, examples: Task | GivenRows) -> list[EncodedRow]:
        """Return `examples`, the value of an option, as rows of token ids."""
        task = Task.of(examples)
        return encode_pairs(self.model, self.tokenizer, task, task.examples)

    def once(self, name: str, make: Callable[[], Sequence[Layers]], kinds: Sequence[str] = ("",)) -> list[Adapter]:
        """Return the updates after task `name`, one for each of `kinds`, from the checkpoint, or else made by `make`."""
        keys = [self._key(name, kind) for kind in kinds]
        kept = [] if self.folder is None else [load_adapter(self.folder, key) for key in keys]
        if kept and None not in kept:
            # in the model's order, like new updates: sums over layers then round alike
            order = [path for path, _ in self.model.named_modules()]
            adapters = [adapter for adapter in kept if adapter is not None]
            return [replace(a, layers={path: a.layers[path] for path in order if path in a.layers}) for a in adapters]
        card = {"recipe": {**self._recipe, "after": self._until(name)}}
        made = [Adapter(name, self.model.name_or_path, layers, self.base, card) for layers in make()]
        if self.folder is not None:
            for key, adapter in zip(keys, made, strict=True):
                save_adapter(self.folder, key, adapter)
        return made

    def _until(self, name: str) -> list[str]:
        names = list(self.tasks)
        return names[: names.index(name) + 1]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.options.items() if isinstance(value, int | float | str | None)}
        begin = {} if self.start is None else {"start": {"hash": self.start.hash, "name": self.start.name}}
        settings = asdict(self.settings)
        return {"method": "loraweave.train_adapters", **settings, "continual": self.way, "settings": plain, **begin}

    def _key(self, name: str, kind: str) -> str:
        """Return the digest of everything that the update of this kind after task `name` depends on."""
        until = [[task, *asdict(self.tasks[task]).values()] for task in self._until(name)]
        options = sorted((key, repr(value)) for key, value in self.options.items())
        content = json.dumps([self._recipe, options, until, len(self.tasks), self.base.to_json(), kind], sort_keys=True)
        return text_digest(content)[:32]


def added(first: Layers, second: Layers) -> dict[str, Factors]:
    """Return the exact sum of two updates; the rank rows of the first come first."""
    names = dict.fromkeys([*first, *second])
    return {name: algebra.add([part[name] for part in (first, second) if name in part]) for name in names}


# makes a task's layers from those after the previous task
Lesson = Callable[[str, Layers], Layers]


def one_by_one(course: Course, lesson: Lesson) -> dict[str, Adapter]:
    """Return {task: the adapter after it}; `lesson(task, layers)` trains its layers from those after the previous task."""
    adapters: dict[str, Adapter] = {}
    layers = course.first
    for name in course.rows:
        (adapters[name],) = course.once(name, partial(_alone, lesson, name, layers))
        layers = adapters[name].layers
    return adapters


def _alone(lesson: Lesson, name: str, layers: Layers) -> list[Layers]:
    return [lesson(name, layers)]


def by_prefix(course: Course, lesson: Lesson) -> dict[str, Adapter]:
    """Return {task: the sum of updates up to it}; `lesson(task, prefix)` trains the task's update over the previous sum."""
    return one_by_one(course, lambda name, prefix: added(prefix, lesson(name, prefix)))


def own_parts(adapters: Mapping[str, Adapter], *, start: Adapter | None = None) -> dict[str, Adapter]:
    """Return {task: the update that it added}, from `train_in_order`'s adapters, each a sum of all updates up to its task.

    Added up from `start` on, they give those sums bit for bit. For `construct_vl`, `inflora`, `gs_lora` and an untuned
    `task_arithmetic`; raises LayerMismatch for an adapter that does not begin with the one before it.
    """
    parts, before = {}, {} if start is None else dict(start.layers)
    for name, adapter in adapters.items():
        layers = {layer: _beyond(name, layer, before.get(layer), factors) for layer, factors in adapter.layers.items()}
        parts[name] = replace(adapter, layers={layer: factors for layer, factors in layers.items() if factors.rank})
        before = dict(adapter.layers)
    return parts


def _beyond(name: str, layer: str, before: Factors | None, after: Factors) -> Factors:
    """Return `after` without its first rank rows, those of `before`. Raises LayerMismatch if it does not begin with them."""
    if before is None:
        return after
    rank = before.rank
    if not (torch.equal(after.a_RI[:rank], before.a_RI) and torch.equal(after.b_OR[:, :rank], before.b_OR)):
        raise LayerMismatch(
            f"the adapter of task {name!r} does not begin with the one before it in layer {layer!r}: it is not a sum of "
            "updates, so nothing of it belongs to one task alone"
        )
    return replace(after, a_RI=after.a_RI[rank:].clone(), b_OR=after.b_OR[:, rank:].clone())


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
    `checkpoint`, a folder, the same call resumes with the task that was interrupted.

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
    """Raise TrainingError for unknown options, several tasks under a name, a later task's start, and launched processes."""
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
