"""Trains many LoRA adapters on one frozen base model, several in each step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from loraweave.composer.batches import EncodedRow, encode
from loraweave.composer.continual._course import Course
from loraweave.composer.layer_kinds.linear import shape as linear_shape
from loraweave.composer.training.checkpoints import load_adapter, save_adapter
from loraweave.composer.training.continual_training import require_way, train_in_order
from loraweave.composer.training.fused_jobs import FusedJobs
from loraweave.composer.training.job_training import JobTraining
from loraweave.composer.training.starts import require_startable
from loraweave.composer.training.training_recipe import WARMUP_STEPS, Recipe, require_trainable
from loraweave.composer.untouched import untouched
from loraweave.errors import TrainingError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.fingerprint import fingerprint
from loraweave.hub.progress import progress_bar
from loraweave.retrieval.training_state import drop_state
from loraweave.types import Fingerprint, Task


def train_adapters(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task | Sequence[tuple[str, str]]],
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
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Adapter]:
    """{task name: Adapter}, in the order of `tasks`; the loss is the mean over target tokens, the base stays as it is.

    Each step runs `jobs_per_batch` jobs of similar length through the frozen base together, `batch_size` rows of each; a job
    gets the gradients of training it alone. AdamW without weight decay, `warmup` steps of warm-up (at most half of all),
    then a cosine to zero, each job's gradient clipped to norm 1. `alpha` is 2 * rank by default. With `checkpoint`, a
    folder, finished adapters and the state of running ones are kept there, and the same call goes on where it was
    interrupted, to the same result.

    A task named in `start` begins as that adapter: a merge, say, which a few steps then fit to the examples. It keeps that
    adapter's layers and ranks, whatever `rank` and `target_modules` are for the others; `alpha / rank` is the scale of all.

    With `linearized` every adapter is trained to first order at its beginning (L-LoRA, `LinearizedJob`): what tasks with a
    common beginning learn superposes exactly in each layer, at any weights. Tasks without a start all begin with the same a,
    which stays; one with a start gets twice its rank, and `tangent(adapter, start)` is what it learned alone.

    With `continual` the tasks are trained one after the other, in the order given and in that way (`lw.names("continual")`,
    docs/continual.md), with the way's own `continual_options`; the adapter of a task is then the whole model after it, and
    `start` can only have the first task's. A checkpoint keeps what each finished task left.

    Raises InvalidTask for examples that cannot be used, UnknownName when no layer matches `target_modules` or no task a name
    in `start`, TrainingError for a loss that is not finite (finished jobs stay in the checkpoint); for an adapter to start
    from BaseModelMismatch, LayerMismatch, and AdapterUnsupported where it is more than factors of linear layers.
    """
    scale_alpha = 2.0 * rank if alpha is None else alpha
    recipe = Recipe(rank, scale_alpha, steps, lr, batch_size, tuple(target_modules), seed, warmup, linearized)
    require_trainable(recipe, tasks, jobs_per_batch)
    options = dict(continual_options or {})
    _require_one_way(continual, options, linearized)
    if continual is not None:
        require_way(continual, options, tasks, start or {})
    begins = require_startable(model, tasks, start or {})
    needs_layers = continual is not None or len(begins) < len(tasks)
    layers = _target_layers(model, recipe.target_modules) if needs_layers else {}
    prepared = {name: task if isinstance(task, Task) else Task(list(task)) for name, task in tasks.items()}
    rows = {name: _encoded(model, tokenizer, task) for name, task in prepared.items()}
    base = fingerprint(model)
    folder = None if checkpoint is None else Path(checkpoint)
    with untouched(model), progress_bar(progress, field="loss") as bar:
        training = JobTraining(model, tokenizer, recipe, bar)
        if continual is None:
            return _train_apart(training, layers, prepared, rows, begins, base, jobs_per_batch, folder)
        begin = begins.get(next(iter(tasks)))
        return train_in_order(
            Course(continual, options, training, layers, prepared, rows, begin, base, jobs_per_batch, folder)
        )


def _train_apart(
    training: JobTraining,
    layers: Mapping[str, tuple[int, int]],
    tasks: Mapping[str, Task],
    rows: Mapping[str, Sequence[EncodedRow]],
    begins: Mapping[str, Adapter],
    base: Fingerprint,
    jobs_per_batch: int,
    folder: Path | None,
) -> dict[str, Adapter]:
    """Each task as if it were alone, in groups of similar length."""
    model, recipe = training.model, training.recipe
    keys = {name: _job_key(recipe, name, task, base, begins.get(name)) for name, task in tasks.items()}
    finished: dict[str, Adapter] = {}
    for name in tasks:
        if folder is not None and (adapter := load_adapter(folder, keys[name])):
            finished[name] = adapter
    waiting = sorted((name for name in tasks if name not in finished), key=lambda name: _mean_length(rows[name]))
    groups = [waiting[first : first + jobs_per_batch] for first in range(0, len(waiting), jobs_per_batch)]
    for group in groups:
        state_key = hashlib.sha256(repr(sorted(keys[name] for name in group)).encode()).hexdigest()[:32]
        given = {name: begins[name].layers for name in group if name in begins}
        jobs = FusedJobs(
            model,
            layers,
            group,
            rank=recipe.rank,
            alpha=recipe.alpha,
            seed=recipe.seed,
            start=given,
            linearized=recipe.linearized,
        )
        training.run(jobs, training.plain(jobs, rows), kept=None if folder is None else (folder, state_key))
        for name in group:
            card = {"recipe": _card(recipe, begins.get(name))}
            finished[name] = Adapter(name, model.name_or_path, jobs.layers_of(name), base, card)
            if folder is not None:
                save_adapter(folder, keys[name], finished[name])
        if folder is not None:
            drop_state(folder, state_key)
    return {name: finished[name] for name in tasks}


def _require_one_way(continual: str | None, options: Mapping[str, Any], linearized: bool) -> None:
    if continual is None and options:
        raise TrainingError(f"continual_options has {', '.join(options)}, but continual names no way to train")
    if continual is not None and linearized:
        raise TrainingError(f"continual={continual!r} trains adapters that are not linearized: pass one of both")


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


def _encoded(model: Any, tokenizer: Any, task: Task) -> list[EncodedRow]:
    prompts = [task.prompt(text) for text, _ in task.examples]
    return encode(model, tokenizer, prompts, [target for _, target in task.examples])


def _card(recipe: Recipe, start: Adapter | None) -> dict[str, Any]:
    card = {"method": "loraweave.train_adapters", **asdict(recipe)}
    return card if start is None else {**card, "start": {"hash": start.hash, "name": start.name}}


def _job_key(recipe: Recipe, name: str, task: Task, base: Fingerprint, start: Adapter | None) -> str:
    begin = None if start is None else start.hash
    parts = [asdict(recipe), name, task.examples, task.instruction, task.template, base.to_json(), begin]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _mean_length(rows: Sequence[EncodedRow]) -> float:
    return sum(len(row) for row in rows) / len(rows)
