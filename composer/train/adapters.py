"""The training of many LoRA adapters on one frozen base model, several in each step."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress
from torch import nn

from loraweave.common.chat import prompt_json
from loraweave.common.checks import is_list
from loraweave.common.descent import checkpoint_folder
from loraweave.common.display import progress_bar
from loraweave.common.names import text_digest
from loraweave.common.options import Count, Positive, Whole, check_options, options_of
from loraweave.common.process import launched_processes
from loraweave.common.rows import GivenRows
from loraweave.common.spread import processes_here
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model.batches import EncodedRow, untouched
from loraweave.composer.model.kinds import linear
from loraweave.composer.model.layers import quantization_of
from loraweave.composer.model.scoring import encode_pairs
from loraweave.composer.train.jobs import LORA, WARMUP_STEPS, JobKind, LoraJob, LoraSettings, TrainingJob, lora_job
from loraweave.composer.train.rows import HeldOut, Judging, Texts, can_be_packed, pack_task
from loraweave.composer.train.shared import SharedTraining, groups, step_memory
from loraweave.composer.train.state import JobReport, PlannedJob, TrainedAdapters, load_adapter, save_adapter
from loraweave.errors import AdapterUnsupported, InvalidTask, PackageMissing, TrainingError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.hub.hub import Hub
from loraweave.hub.pool import require_everywhere
from loraweave.registry import bringing
from loraweave.types import Fingerprint, Task


def train_adapters(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task | Texts | GivenRows | Sequence[Task | Texts]],
    *,
    rank: Count = 8,
    steps: Count = 60,
    jobs_per_batch: Count = 4,
    seed: int = 0,
    alpha: Positive | None = None,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    start: Mapping[str, Adapter] | None = None,
    kind: JobKind = LORA,
    warmup: Whole = WARMUP_STEPS,
    held_out: float | Mapping[str, Task | GivenRows] | None = None,
    evaluate_every: Count = 10,
    patience: Count | None = None,
    memory_bytes: Count | None = None,
    checkpoint: str | Path | None = None,
    hub: Hub | None = None,
    n_jobs: int | None = None,
    progress: bool | Progress = True,
) -> TrainedAdapters:
    """Train an adapter for each task; return {task name: Adapter}, in the order of `tasks`. The base stays as it is.

    The loss is the mean over target tokens. Each step runs up to `jobs_per_batch` jobs of similar length through the frozen
    base together, `batch_size` rows of each; a job gets the gradients of training it alone. A step takes at most
    `memory_bytes`, base and all, as `MemoryModel` estimates it (by default what is free); where memory is short, fewer jobs
    share it. A list of tasks trains one adapter on all of them. Of `Texts` every token is learned: continued pre-training. A
    task that shows its own examples is trained on rows of up to 8, each answer given those before it (`pack_task`), unless
    some are `held_out`.

    The optimizer is AdamW without weight decay, with `warmup` steps of warm-up (at most half of all), then a cosine to zero;
    a job's gradient is clipped to norm 1. `alpha` is 2 * rank by default. `report` of the result has tokens a second,
    padding, memory, and how each job ended. The same call goes on from what `checkpoint`, a folder, has kept, to the same
    result.

    `held_out`, a share of each task's examples between 0 and 1, or examples by task, is evaluated every `evaluate_every`
    steps and after the last; the best factors are kept, and `patience` evaluations without better ones end a task.

    A task named in `start` begins as that adapter and keeps its layers and ranks, whatever `rank` and `target_modules` are;
    `alpha / rank` is the scale of all. `kind` is another kind of job than LoRA: in the extension `continual`, `Linearized()`
    trains to first order, and `Beside(adapter)` on what that adapter leaves of a layer's inputs.

    With `n_jobs` workers (-1: all cores), or those that `joblib.parallel_config` names, processes of this machine, Ray or
    Dask train groups of jobs, to the same bits for any number of workers (docs/howto/many_machines.md). Each loads the model
    by its name. A `hub` gets a group's adapters when it ends; what it has of the same training is not trained again.
    Processes of `torchrun` or `accelerate launch` share the rows of each step; their number divides `batch_size`.

    Raises InvalidTask for unusable examples, UnknownName when no layer matches `target_modules` or no task a name in `start`
    or `held_out`, BudgetExceeded for a task that alone exceeds the memory, TrainingError for settings out of range, a
    checkpoint that cannot be written and a loss that is not finite, PackageMissing for `hub`, `n_jobs` and `memory_bytes`
    without their extension, WorkersFailed for lost workers, AdapterExists for a name that the hub has, BaseModelMismatch,
    LayerMismatch or AdapterUnsupported for an adapter that no task can start from.
    """
    lora: dict[str, Any] = {"rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "warmup": warmup}
    shared_by: dict[str, Any] = {"jobs_per_batch": jobs_per_batch, "memory_bytes": memory_bytes}
    judged: dict[str, Any] = {"evaluate_every": evaluate_every, "patience": patience}
    if not isinstance(kind, JobKind):
        raise TrainingError(f"kind is {kind!r:.60}; leave it out, or pass a kind of jobs, such as Linearized()")
    options = {**lora, **shared_by, **judged, "alpha": alpha}
    check_options("train_adapters()", options, options_of(train_adapters), error=TrainingError)
    settings = LoraSettings.of(target_modules, alpha, **lora, linearized=kind.linearized)
    prepared, judging = read_tasks(tasks), Judging(held_out, evaluate_every, patience)
    judging.require({name: sum(len(task.examples) for task in parts) for name, parts in prepared.items()})
    in_groups = _groups(hub, n_jobs)
    kind.require(model, start or ())
    begins = require_startable(model, tasks, start or {})
    layers = target_layers(model, settings.target_modules) if len(begins) < len(tasks) else {}
    rows, held_out_rows = read_rows(model, tokenizer, prepared, judging, seed)
    with untouched(model), progress_bar(progress, field="loss") as bar:
        shared = SharedTraining(model, tokenizer, bar, folder=checkpoint_folder(checkpoint), **shared_by)
        apart = Apart(shared, settings, layers, prepared, rows, held_out_rows, begins, kind, fingerprint(model))
        if in_groups is None:
            return apart.train()
        trained: TrainedAdapters = in_groups.train_in_groups(apart, judging, hub, n_jobs)
        return trained


def read_tasks(tasks: Mapping[str, Any]) -> dict[str, tuple[Task | Texts, ...]]:
    """Return {name: its tasks or texts}, each value a tuple even where the caller gave a single task.

    Raises TrainingError for no tasks and for tasks without examples, InvalidTask for rows that are not examples.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    require_texts("task", tasks)
    read: dict[str, tuple[Task | Texts, ...]] = {}
    for name, task_rows in tasks.items():
        parts = [task_rows] if isinstance(task_rows, Texts) else task_rows
        try:
            read[name] = tuple(parts) if is_list(parts, Task | Texts) and parts else (Task.of(task_rows),)
        except InvalidTask as error:
            raise InvalidTask(f"task {name!r}: {error}") from error
        if not all(task.examples for task in read[name]):
            raise TrainingError(f"task {name!r} has no examples")
    return read


def require_texts(what: str, names: Iterable[Any]) -> None:
    """Raise TrainingError for names that are not texts."""
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TrainingError(f"{what} {strange[0]!r} has no text for a name: name it by one")


def read_rows(
    model: Any, tokenizer: Any, tasks: Mapping[str, Sequence[Task | Texts]], judging: Judging, seed: int
) -> tuple[Mapping[str, Sequence[EncodedRow]], dict[str, HeldOut]]:
    """Return {name: rows to train on}, packed if nothing is held out (see `training_rows`), and {name: held-out rows}."""
    packs = judging.held_out is None

    def read(name: str, examples: Any) -> list[EncodedRow]:
        first = tasks[name][0]
        if not isinstance(examples, Task | Texts):
            examples = replace(first, texts=examples) if isinstance(first, Texts) else replace(first, examples=examples)
        return training_rows(model, tokenizer, [examples], seed, packs=packs)

    rows_by_name = {name: training_rows(model, tokenizer, parts, seed, packs=packs) for name, parts in tasks.items()}
    return judging.split(rows_by_name, read, seed)


def training_rows(
    model: Any, tokenizer: Any, tasks: Iterable[Task | Texts], seed: int, *, packs: bool = True
) -> list[EncodedRow]:
    """Return one adapter's training rows; `packs` puts several examples of a task that demonstrates with them into a row."""
    rows: list[EncodedRow] = []
    for task in tasks:
        if isinstance(task, Texts):
            rows += task.rows(model, tokenizer)
        elif packs and can_be_packed(model, task):
            rows += pack_task(model, tokenizer, task, seed)
        else:
            rows += encode_pairs(model, tokenizer, task, task.examples)
    return rows


def _groups(hub: Hub | None, n_jobs: int | None) -> Any:
    """Return the extension that trains in groups, by workers or into a hub; None without `hub` and `n_jobs`.

    Raises TrainingError if `hub` is not a Hub or arguments exclude each other, PackageMissing without such an extension.
    """
    if not isinstance(hub, Hub | None):
        raise TrainingError(f"hub is {hub!r:.60}; pass a Hub that takes the adapters, or None")
    whole = {"hub": hub, "n_jobs": processes_here(n_jobs)}
    options = [option for option, value in whole.items() if value is not None]
    if not options:
        return None
    if (count := launched_processes()) > 1:
        raise TrainingError(
            f"{count} processes were launched, which share the rows of each step, and {options[0]} is for one"
        )
    module = next(bringing("groups"), None)
    if module is None:
        raise PackageMissing(f"{options[0]} trains in groups, which none of the extensions at hand does: leave it out")
    return module


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (O, I) of the linear layers whose path ends in one of `targets`. Raises UnknownName if a target has none."""
    shapes = {name: shape[:2] for name, module in model.named_modules() if (shape := linear.shape(module))}
    matched: dict[str, tuple[int, int]] = {}
    for target in targets:
        matching = {name: shape for name, shape in shapes.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in shapes}))
            raise UnknownName(f"no linear layer matches {target!r} of target_modules; the model has {endings}")
        matched |= matching
    # in the model's order, whatever the order of the targets
    return {name: shape for name, shape in shapes.items() if name in matched}


Layers = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Apart:
    """A training of separate jobs, one adapter per task, all of one kind.

    `layers` has (O, I) of each target layer, `begins` the adapters that tasks start from.
    """

    shared: SharedTraining
    settings: LoraSettings
    layers: Layers
    tasks: Mapping[str, Sequence[Task | Texts]]
    rows: Mapping[str, Sequence[EncodedRow]]
    held_out: Mapping[str, HeldOut]
    begins: Mapping[str, Adapter]
    kind: JobKind
    base: Fingerprint

    def train(self) -> TrainedAdapters:
        """Train the tasks; return {task: its adapter}, loading adapters that the checkpoint has finished."""
        finished: dict[str, Adapter] = {}

        def load(folder: Path, name: str, key: str) -> bool:
            if (adapter := load_adapter(folder, key)) is not None:
                finished[name] = adapter
                self.shared.report.note_jobs({name: adapter})
            return adapter is not None

        def save(folder: Path | None, key: str, job: TrainingJob, report: JobReport) -> None:
            finished[job.name] = self._adapter(cast(LoraJob, job), report)
            if folder is not None:
                save_adapter(folder, key, finished[job.name])

        report = self.shared.train(self.rows, self.plan, self.key, load, save)
        report.jobs = {name: report.jobs[name] for name in self.rows if name in report.jobs}
        return TrainedAdapters({name: finished[name] for name in self.rows}, report)

    def plan(self, name: str) -> PlannedJob:
        settings = self.settings
        start = self.begins[name].layers if name in self.begins else None
        make = partial(lora_job, self.shared.model, name, self.layers, settings, start, self.kind)
        if start is None:
            num_parameters = sum(settings.rank * (outputs + inputs) for outputs, inputs in self.layers.values())
        else:
            num_parameters = sum(part.a_RI.numel() + part.b_OR.numel() for part in start.values())
        return PlannedJob(name, make, num_parameters, self.rows[name], settings, self.held_out.get(name))

    def groups(self, here: int) -> tuple[list[list[str]], int | None]:
        """Return (groups of tasks that share steps, bytes for a step if `here` processes share the free memory)."""
        planned, shared = [self.plan(name) for name in self.tasks], self.shared
        largest = max(planned, key=lambda job: job.num_parameters).make()

        def share(free: int | None) -> int | None:
            return None if free is None else free // here

        memory = step_memory(shared.model, shared.tokenizer, largest, shared.memory_bytes, share=share)
        sizes = {job.name: job.size(shared.model) for job in planned}
        return groups(sizes, shared.jobs_per_batch, memory.fits), memory.budget

    def _adapter(self, job: LoraJob, report: JobReport) -> Adapter:
        start = self.begins.get(job.name)
        recipe: dict[str, Any] = {"method": "loraweave.train_adapters", **asdict(self.settings)}
        if start is not None:
            recipe["start"] = {"hash": start.hash, "name": start.name}
        card = {
            "recipe": {**recipe, **self.kind.recipe()},
            "training": report.to_json(),
            **quantization_of(self.shared.model),
        }
        return Adapter(job.name, self.shared.model.name_or_path, job.result(), self.base, card)

    def key(self, name: str) -> str:
        """Return the digest of everything a task's adapter depends on."""
        (task, *others), begin = self.tasks[name], self.begins.get(name)
        said: list[Any] = [None, None, None]
        if isinstance(task, Task):
            examples = [[prompt_json(prompt), target] for prompt, target in task.examples]
            said = [examples, task.instruction, task.template]
        parts: list[Any] = [asdict(self.settings), name, *said, self.base.to_json()]
        parts.append(None if begin is None else begin.hash)
        if (held_out := self.held_out.get(name)) is not None:
            rows = [[row.prompt, row.target] for row in held_out.rows]
            parts += [rows, held_out.every, held_out.patience]
        parts += self.kind.identity()
        if others or isinstance(task, Texts) or task.demonstrations or task.chat:
            parts.append([[row.prompt, row.target, row.labels] for row in self.rows[name]])
        return text_digest(json.dumps(parts, sort_keys=True))[:32]


TRAINED = {"a_RI", "b_OR"}


def require_startable(model: Any, tasks: Collection[str], start: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return {task name: adapter}, after a check that each fits the model and has only factors of linear layers.

    Raises TrainingError for values other than adapters, UnknownName for a name without a task, BaseModelMismatch or
    LayerMismatch for an adapter of another model, AdapterUnsupported for heads, gains, biases, magnitudes, embeddings
    and convolutions, ScopeError for one with invocation tokens.
    """
    if not isinstance(start, Mapping):
        raise TrainingError(f"start is {start!r:.60}; pass {{task: the adapter that it begins as}}")
    if strange := [name for name, adapter in start.items() if not isinstance(adapter, Adapter)]:
        raise TrainingError(f"task {strange[0]!r} cannot start from {start[strange[0]]!r:.60}: pass an Adapter")
    if unknown := [name for name in start if name not in tasks]:
        raise UnknownName(f"start has an adapter for {unknown[0]!r}, which is not a task; the tasks are {', '.join(tasks)}")
    require_plain(model, {f"task {name!r} cannot start from": adapter for name, adapter in start.items()})
    return dict(start)


def require_plain(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Raise an error unless the adapters fit the model, have only a and b, of linear layers, and need no invocation tokens.

    The keys begin the error messages: {"task 'x' cannot start from": adapter}.
    """
    fitting = Fitting(model)
    for refusal, adapter in adapters.items():
        fitting.adapter(adapter.name, adapter)
        require_everywhere(adapter.name, adapter, "training lets an adapter act on every token")
        for layer, factors in adapter.layers.items():
            beyond, reason = sorted(set(factors.tensors()) - TRAINED), f"{refusal} adapter {adapter.name!r}: layer {layer!r}"
            if beyond:
                raise AdapterUnsupported(f"{reason} has {' and '.join(beyond)}, and only a_RI and b_OR are trained")
            if factors.kind != "linear":
                raise AdapterUnsupported(f"{reason} is of kind {factors.kind!r}, and only linear layers are trained")
