"""Trains many LoRA adapters on one frozen base model, several in each step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from loraweave.common.rows import GivenRows
from loraweave.composer.batches import EncodedRow
from loraweave.composer.continual._course import Course
from loraweave.composer.layer_kinds.linear import shape as linear_shape
from loraweave.composer.training.apart_training import Apart
from loraweave.composer.training.continual_training import require_way, train_in_order
from loraweave.composer.training.held_out import Judging, encoded_task
from loraweave.composer.training.job_training import JobTraining
from loraweave.composer.training.pace import WARMUP_STEPS
from loraweave.composer.training.starts import require_startable
from loraweave.composer.training.training_recipe import Recipe, require_memory, require_trainable
from loraweave.composer.training.training_report import TrainedAdapters
from loraweave.composer.untouched import untouched
from loraweave.errors import TrainingError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.fingerprint import fingerprint
from loraweave.hub.progress import progress_bar
from loraweave.hub.whole_number import require_whole
from loraweave.retrieval.training_state import checkpoint_folder
from loraweave.types import Task


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
