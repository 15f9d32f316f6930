"""Trains many LoRA adapters on one frozen base model, several in each step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from loraweave.composer.batches import IGNORED, EncodedRow, batch, encode, token_losses
from loraweave.composer.checkpoints import load_adapter, save_adapter
from loraweave.composer.fused_jobs import FusedJobs
from loraweave.composer.layer_kinds.linear import shape as linear_shape
from loraweave.composer.starts import require_startable
from loraweave.errors import TrainingError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.fingerprint import fingerprint
from loraweave.retrieval.training_state import TrainingState, drop_state, load_state, save_state
from loraweave.types import Task

logger = logging.getLogger(__name__)

WARMUP_STEPS = 10
GRADIENT_LIMIT = 1.0
CHECKPOINT_STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """What determines a trained adapter, besides its examples and the base model."""

    rank: int
    alpha: float
    steps: int
    lr: float
    batch_size: int
    target_modules: tuple[str, ...]
    seed: int
    warmup: int = WARMUP_STEPS


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

    Raises InvalidTask for examples that cannot be used, UnknownName when no layer matches `target_modules` or no task a name
    in `start`, TrainingError for a loss that is not finite (finished jobs stay in the checkpoint); for an adapter to start
    from BaseModelMismatch, LayerMismatch, and AdapterUnsupported where it is more than factors of linear layers.
    """
    scale_alpha = 2.0 * rank if alpha is None else alpha
    recipe = Recipe(rank, scale_alpha, steps, lr, batch_size, tuple(target_modules), seed, warmup)
    _check(recipe, tasks, jobs_per_batch)
    begins = require_startable(model, tasks, start or {})
    layers = _target_layers(model, recipe.target_modules) if len(begins) < len(tasks) else {}
    prepared = {name: task if isinstance(task, Task) else Task(list(task)) for name, task in tasks.items()}
    rows = {name: _encoded(model, tokenizer, task) for name, task in prepared.items()}
    base = fingerprint(model)
    folder = None if checkpoint is None else Path(checkpoint)
    keys = {name: _job_key(recipe, name, task, base.shapes, begins.get(name)) for name, task in prepared.items()}
    finished: dict[str, Adapter] = {}
    for name in prepared:
        if folder is not None and (adapter := load_adapter(folder, keys[name])):
            finished[name] = adapter
    waiting = sorted((name for name in prepared if name not in finished), key=lambda name: _mean_length(rows[name]))
    groups = [waiting[start : start + jobs_per_batch] for start in range(0, len(waiting), jobs_per_batch)]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with _progress(progress) as bar:
            for group in groups:
                state_key = hashlib.sha256(repr(sorted(keys[name] for name in group)).encode()).hexdigest()[:32]
                given = {name: begins[name].layers for name in group if name in begins}
                jobs = FusedJobs(model, layers, group, rank=rank, alpha=recipe.alpha, seed=seed, start=given)
                _train_group(model, tokenizer, jobs, {name: rows[name] for name in group}, recipe, folder, state_key, bar)
                for name in group:
                    card = {"recipe": _card(recipe, begins.get(name))}
                    finished[name] = Adapter(name, model.name_or_path, jobs.layers_of(name), base, card)
                    if folder is not None:
                        save_adapter(folder, keys[name], finished[name])
                if folder is not None:
                    drop_state(folder, state_key)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(was_training)
    return {name: finished[name] for name in prepared}


def _train_group(
    model: Any,
    tokenizer: Any,
    jobs: FusedJobs,
    rows: Mapping[str, Sequence[EncodedRow]],
    recipe: Recipe,
    folder: Path | None,
    state_key: str,
    bar: Progress,
) -> None:
    optimizer = torch.optim.AdamW(jobs.parameters(), lr=recipe.lr, weight_decay=0.0)
    start = 0
    if folder is not None and (state := load_state(folder, state_key)):
        start = state.restore(jobs.parameters(), optimizer)
    shown = bar.add_task(", ".join(jobs.jobs), total=recipe.steps, completed=start, loss="")
    with jobs:
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step, recipe)
            chosen = [row for job in jobs.jobs for row in _rows_of_step(rows[job], recipe, job, step)]
            losses_J = _job_losses(model, tokenizer, chosen, len(jobs.jobs))
            _require_finite(losses_J, jobs, step)
            optimizer.zero_grad()
            losses_J.sum().backward()  # type: ignore[no-untyped-call]
            jobs.clip(GRADIENT_LIMIT)
            optimizer.step()
            bar.update(shown, advance=1, loss=f"loss {float(losses_J.detach().mean()):.3f}")
            if folder is not None and (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < recipe.steps:
                save_state(folder, state_key, TrainingState.of(step + 1, jobs.parameters(), optimizer))


def _job_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], num_jobs: int) -> Tensor:
    """loss_J: the mean over the target tokens of each job's rows."""
    stacked = batch(model, tokenizer, rows)
    losses_JN = token_losses(model, stacked).view(num_jobs, -1)
    counts_J = (stacked.targets_BK != IGNORED).view(num_jobs, -1).sum(dim=1)
    return losses_JN.sum(dim=1) / counts_J


def _rows_of_step(rows: Sequence[EncodedRow], recipe: Recipe, job: str, step: int) -> list[EncodedRow]:
    """The job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
    chosen = []
    for place in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, offset = divmod(place, len(rows))
        digest = hashlib.sha256(repr((recipe.seed, job, epoch)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        chosen.append(rows[int(torch.randperm(len(rows), generator=generator)[offset])])
    return chosen


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up to 1, then half a cosine down to 0 after the last step."""
    warmup = min(recipe.warmup, recipe.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


def _require_finite(losses_J: Tensor, jobs: FusedJobs, step: int) -> None:
    if not bool(torch.isfinite(losses_J).all()):
        job = jobs.jobs[int((~torch.isfinite(losses_J)).nonzero()[0])]
        raise TrainingError(
            f"the loss of job {job!r} is {float(losses_J.detach()[jobs.jobs.index(job)])} at step {step + 1}; "
            "lower lr, or look for damaged examples. Adapters that were finished before are kept"
        )


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


def _job_key(recipe: Recipe, name: str, task: Task, base: str, start: Adapter | None) -> str:
    begin = None if start is None else start.hash
    parts = [asdict(recipe), name, task.examples, task.instruction, task.template, base, begin]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _mean_length(rows: Sequence[EncodedRow]) -> float:
    return sum(len(row) for row in rows) / len(rows)


def _check(recipe: Recipe, tasks: Mapping[str, Any], jobs_per_batch: int) -> None:
    if not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    counts = {"rank": recipe.rank, "steps": recipe.steps, "batch_size": recipe.batch_size, "jobs_per_batch": jobs_per_batch}
    for field, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise TrainingError(f"{field} is {value!r}; it must be a whole number of at least 1")
    if not isinstance(recipe.warmup, int) or recipe.warmup < 0:
        raise TrainingError(f"warmup is {recipe.warmup!r}; it must be a whole number of at least 0")
    for field, rate in {"lr": recipe.lr, "alpha": recipe.alpha}.items():
        if not rate > 0 or not math.isfinite(rate):
            raise TrainingError(f"{field} is {rate!r}; it must be above 0")
    for name, task in tasks.items():
        if not (task.examples if isinstance(task, Task) else task):
            raise TrainingError(f"task {name!r} has no examples")


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), disable=not shown)
