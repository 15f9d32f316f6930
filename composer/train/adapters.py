"""Trains many LoRA adapters on one frozen base model, several in each step."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress
from torch import nn

from loraweave import registry
from loraweave.common.checks import require_whole
from loraweave.common.display import progress_bar
from loraweave.common.rows import GivenRows
from loraweave.common.state import checkpoint_folder
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model.batches import EncodedRow, untouched
from loraweave.composer.model.kinds.linear import shape as linear_shape
from loraweave.composer.train.fused import FusedTraining
from loraweave.composer.train.jobs import LoraJob, PlannedJob, TrainingJob
from loraweave.composer.train.ordered._course import Course
from loraweave.composer.train.passes import JobTraining, lora_job
from loraweave.composer.train.report import JobReport, TrainedAdapters, TrainingReport
from loraweave.composer.train.rows import HeldOut, Judging, encoded_task
from loraweave.composer.train.schedule import WARMUP_STEPS
from loraweave.composer.train.settings import Recipe, require_memory, require_trainable
from loraweave.composer.train.state import RunningState, load_adapter, save_adapter
from loraweave.errors import AdapterUnsupported, TrainingError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.types import Fingerprint, Task


def train_adapters(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task | GivenRows],
    *,
    rank: int = 8,
    steps: int = 60,
    jobs_per_batch: int = 4,
    seed: int = 0,
    alpha: float | None = None,
    lr: float = 3e-3,
    batch_size: int = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    start: Mapping[str, Adapter] | None = None,
    linearized: bool = False,
    continual: str | None = None,
    continual_options: Mapping[str, Any] | None = None,
    warmup: int = WARMUP_STEPS,
    held_out: float | Mapping[str, Task | GivenRows] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    memory_bytes: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TrainedAdapters:
    """{task name: Adapter}, in the order of `tasks`; the loss is the mean over target tokens, the base stays as it is.

    Each step runs up to `jobs_per_batch` jobs of similar length through the frozen base together, `batch_size` rows of each;
    a job gets the gradients of training it alone. When one ends early, the next takes its place. `memory_bytes` is what a
    step may take, base and all, by an estimate (`MemoryModel`): fewer jobs then share a step; by default it is what is free.
    AdamW without weight decay, `warmup` steps of warm-up (at most half of all), then a cosine to zero, each job's gradient
    clipped to norm 1. `alpha` is 2 * rank by default. The dict's `report` has tokens a second, padding, memory, and how each
    job ended. With `checkpoint`, a folder, finished adapters and the state of running ones are kept there, and the same call
    goes on where it was interrupted, to the same result.

    `held_out` is a share of each task's examples, above 0 and below 1, or examples by task: not trained on, but evaluated
    after every `evaluate_every` steps and after the last, and it has the factors of the lowest loss (the report also
    has the loss before the first step). With `patience`, a task ends when so many evaluations in a row brought none lower.

    A task named in `start` begins as that adapter: a merge, say, which a few steps then fit to the examples. It keeps that
    adapter's layers and ranks, whatever `rank` and `target_modules` are for the others; `alpha / rank` is the scale of all.

    With `linearized` every adapter is trained to first order at its beginning (L-LoRA, `LinearizedJob`): what tasks with a
    common beginning learn superposes exactly in each layer, at any weights. Tasks without a start all begin with the same a,
    which stays; one with a start gets twice its rank, and `tangent(adapter, start)` is what it learned alone.

    With `continual` the tasks are trained one after the other, in the order given and in that way (`lw.names("continual")`,
    docs/continual.md), with the way's own `continual_options`; the adapter of a task is then the whole model after it, and
    `start` can only have the first task's. A checkpoint keeps what each finished task left.

    Raises InvalidTask for examples that cannot be used, UnknownName when no layer matches `target_modules` or no task a name
    in `start` or `held_out`, BudgetExceeded for a task that does not fit into memory alone, TrainingError for settings out
    of range, a checkpoint that cannot be written, and a loss that is not finite (finished jobs stay in the checkpoint); for
    an adapter to start from BaseModelMismatch, LayerMismatch, and AdapterUnsupported where it is more than factors of linear
    layers.
    """
    if isinstance(target_modules, str) or not isinstance(target_modules, Collection) or not target_modules:
        raise TrainingError(f"target_modules is {target_modules!r}; it must be a list of endings of module paths")
    require_whole("rank", rank, 1, TrainingError)
    scale_alpha = 2.0 * rank if alpha is None else alpha
    recipe = Recipe(rank, scale_alpha, steps, lr, batch_size, tuple(target_modules), seed, warmup, linearized)
    prepared = require_trainable(recipe, tasks, jobs_per_batch)
    judging = Judging(held_out, evaluate_every, patience)
    judging.require({name: len(task.examples) for name, task in prepared.items()})
    require_memory(memory_bytes)
    options = dict(continual_options or {})
    _require_one_way(continual, options, linearized, held_out is not None or memory_bytes is not None)
    if continual is not None:
        require_way(continual, options, tasks, start or {})
    begins = require_startable(model, tasks, start or {})
    needs_layers = continual is not None or len(begins) < len(tasks)
    layers = _target_layers(model, recipe.target_modules) if needs_layers else {}

    def read(name: str, examples: Any) -> list[EncodedRow]:
        task = examples if isinstance(examples, Task) else replace(prepared[name], examples=examples)
        return encoded_task(model, tokenizer, task)

    encoded = {name: encoded_task(model, tokenizer, task) for name, task in prepared.items()}
    rows, held_out_rows = judging.parted(encoded, read, seed)
    base = fingerprint(model)
    folder = checkpoint_folder(checkpoint)
    with untouched(model), progress_bar(progress, field="loss") as bar:
        if continual is None:
            apart = Apart(
                model,
                tokenizer,
                recipe,
                layers,
                prepared,
                rows,
                held_out_rows,
                begins,
                base,
                jobs_per_batch,
                memory_bytes,
                folder,
            )
            return apart.train(bar)
        training = JobTraining(model, tokenizer, recipe, bar)
        begin = begins.get(next(iter(tasks)))
        course = Course(continual, options, training, layers, prepared, rows, begin, base, jobs_per_batch, folder)
        return TrainedAdapters(train_in_order(course))


def _require_one_way(continual: str | None, options: Mapping[str, Any], linearized: bool, scheduled: bool) -> None:
    if continual is None and options:
        raise TrainingError(f"continual_options has {', '.join(options)}, but continual names no way to train")
    if continual is not None and linearized:
        raise TrainingError(f"continual={continual!r} trains adapters that are not linearized: pass one of both")
    if continual is not None and scheduled:
        raise TrainingError(f"continual={continual!r} has neither held_out nor memory_bytes: leave them out")


def _target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(O, I) of the linear layers whose module path ends in one of `targets`; UnknownName for one that matches nothing."""
    linear = {name: shape[:2] for name, module in model.named_modules() if (shape := linear_shape(module))}
    found: dict[str, tuple[int, int]] = {}
    for target in targets:
        matching = {name: shape for name, shape in linear.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UnknownName(f"no linear layer matches {target!r} of target_modules; the model has {endings}")
        found |= matching
    # in the model's order, whatever the order of the targets
    return {name: shape for name, shape in linear.items() if name in found}


Layers = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Apart:
    """`layers` has (O, I) of each target layer, `begins` the adapters that tasks begin from."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    layers: Layers
    tasks: Mapping[str, Task]
    rows: Mapping[str, Sequence[EncodedRow]]
    held_out: Mapping[str, HeldOut]
    begins: Mapping[str, Adapter]
    base: Fingerprint
    jobs_per_batch: int
    memory_bytes: int | None
    folder: Path | None

    def train(self, bar: Progress) -> TrainedAdapters:
        """{task: its adapter}, of which a checkpoint has what was finished."""
        keys = {name: self._key(name) for name in self.tasks}
        kept = None if self.folder is None else RunningState(self.folder, keys, [self.jobs_per_batch, self.memory_bytes])
        running = set() if kept is None else kept.names()
        finished = self._finished({name: key for name, key in keys.items() if name not in running})
        planned = [self._planned(name) for name in self.tasks if name not in finished]
        training = FusedTraining(
            self.model,
            self.tokenizer,
            planned,
            bar,
            jobs_per_batch=self.jobs_per_batch,
            memory_bytes=self.memory_bytes,
            kept=kept,
        )

        def ended(job: TrainingJob, report: JobReport) -> None:
            assert isinstance(job, LoraJob)
            finished[job.name] = self._adapter(job, report)
            if self.folder is not None:
                save_adapter(self.folder, keys[job.name], finished[job.name])

        report = training.run(ended) if planned else TrainingReport()
        # an adapter that another version has finished says nothing of its training
        told = {name: finished[name].card["training"] for name in self.tasks if "training" in finished[name].card}
        report.jobs = {name: JobReport.from_json(values) for name, values in told.items()}
        return TrainedAdapters({name: finished[name] for name in self.tasks}, report)

    def _finished(self, keys: Mapping[str, str]) -> dict[str, Adapter]:
        if self.folder is None:
            return {}
        found = {name: load_adapter(self.folder, key) for name, key in keys.items()}
        return {name: adapter for name, adapter in found.items() if adapter is not None}

    def _planned(self, name: str) -> PlannedJob:
        recipe, model = self.recipe, self.model
        start = self.begins[name].layers if name in self.begins else None

        def make() -> LoraJob:
            return lora_job(
                name,
                self.layers,
                start,
                rank=recipe.rank,
                alpha=recipe.alpha,
                seed=recipe.seed,
                device=next(model.parameters()).device,
                linearized=recipe.linearized,
            )

        if start is None:
            num_parameters = sum(recipe.rank * (outputs + inputs) for outputs, inputs in self.layers.values())
        else:
            num_parameters = sum(part.a_RI.numel() + part.b_OR.numel() for part in start.values())
        return PlannedJob(name, make, num_parameters, self.rows[name], recipe.pace, self.held_out.get(name))

    def _adapter(self, job: LoraJob, report: JobReport) -> Adapter:
        start = self.begins.get(job.name)
        recipe: dict[str, Any] = {"method": "loraweave.train_adapters", **asdict(self.recipe)}
        if start is not None:
            recipe["start"] = {"hash": start.hash, "name": start.name}
        card = {"recipe": recipe, "training": report.to_json()}
        return Adapter(job.name, self.model.name_or_path, job.result(), self.base, card)

    def _key(self, name: str) -> str:
        """Of all that a task's adapter depends on."""
        task, begin = self.tasks[name], self.begins.get(name)
        parts: list[Any] = [asdict(self.recipe), name, task.examples, task.instruction, task.template, self.base.to_json()]
        parts.append(None if begin is None else begin.hash)
        if (held_out := self.held_out.get(name)) is not None:
            rows = [[row.prompt, row.target] for row in held_out.rows]
            parts += [rows, held_out.every, held_out.patience]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def require_way(way: str, options: Mapping[str, Any], tasks: Mapping[str, Any], start: Mapping[str, Adapter]) -> None:
    """UnknownName for a way that is none; TrainingError for an option it does not have, and for a start of a later task."""
    known = _options(way)
    for option in options:
        if option not in known:
            hint = registry.nearest(option, known)
            raise TrainingError(f"continual {way!r} has no option {option!r}{hint}; it has {', '.join(known) or 'none'}")
    first = next(iter(tasks))
    if later := [name for name in start if name != first]:
        raise TrainingError(
            f"start has an adapter for task {later[0]!r}, but tasks that are learned one after the other begin once: "
            f"give the adapter to the first, {first!r}"
        )


def train_in_order(course: Course) -> dict[str, Adapter]:
    """{task: the adapter after that task}."""
    return cast(dict[str, Adapter], registry.get("continual", course.way)(course, **course.settings))


def _options(way: str) -> list[str]:
    return list(inspect.signature(registry.get("continual", way)).parameters)[1:]


TRAINED = {"a_RI", "b_OR"}


def require_startable(model: Any, tasks: Collection[str], start: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """{task name: adapter}, all of which fit the model and are factors of linear layers alone.

    Raises TrainingError for what are no adapters, UnknownName for a name without a task, BaseModelMismatch or LayerMismatch
    for an adapter of another model, AdapterUnsupported for heads, gains, biases, magnitudes, embeddings and convolutions.
    """
    if not isinstance(start, Mapping):
        raise TrainingError(f"start is {start!r:.60}; pass {{task: the adapter that it begins as}}")
    if strange := [name for name, adapter in start.items() if not isinstance(adapter, Adapter)]:
        raise TrainingError(f"task {strange[0]!r} cannot start from {start[strange[0]]!r:.60}: pass an Adapter")
    if unknown := [name for name in start if name not in tasks]:
        raise UnknownName(f"start has an adapter for {unknown[0]!r}, which is no task; there are {', '.join(tasks)}")
    fitting = Fitting(model)
    for name, adapter in start.items():
        fitting.adapter(adapter.name, adapter)
        for layer, factors in adapter.layers.items():
            if beyond := sorted(set(factors.tensors()) - TRAINED):
                raise AdapterUnsupported(
                    f"task {name!r} cannot start from adapter {adapter.name!r}: layer {layer!r} has {' and '.join(beyond)}, "
                    "and only a_RI and b_OR are trained"
                )
            if factors.kind != "linear":
                raise AdapterUnsupported(
                    f"task {name!r} cannot start from adapter {adapter.name!r}: layer {layer!r} is of kind "
                    f"{factors.kind!r}, and only linear layers are trained"
                )
    return dict(start)
