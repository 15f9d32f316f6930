"""Trains several expert models on one base in the same passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.composer.experts.expert_job import ExpertJob
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.training.fused_training import FusedTraining
from loraweave.composer.training.held_out import Judging
from loraweave.composer.training.pace import WARMUP_STEPS, Pace
from loraweave.composer.training.planned_job import PlannedJob
from loraweave.composer.training.training_recipe import require_steps
from loraweave.composer.training.training_report import TrainingReport
from loraweave.composer.untouched import untouched
from loraweave.errors import TrainingError
from loraweave.hub.progress import progress_bar
from loraweave.types import Task

Examples = Task | Sequence[tuple[str, str]]


def train_experts(
    model: Any,
    tokenizer: Any,
    jobs: Mapping[str, tuple[ExpertModel, Examples]],
    *,
    steps: int = 60,
    lr: float = 3e-3,
    batch_size: int = 8,
    warmup: int = WARMUP_STEPS,
    seed: int = 0,
    jobs_per_batch: int = 4,
    held_out: float | Mapping[str, Sequence[tuple[str, str]]] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    memory_bytes: int | None = None,
    progress: bool = True,
) -> TrainingReport:
    """What the training of expert models (`lw.experts`) on this base did; the models are trained where they are.

    Each has experts and gates of its own and learns from its own examples, by the loss of `train_adapters` and the losses of
    its recipe, with the gradients of being trained alone: AdamW without weight decay, clipped to norm 1. Rows share passes
    and jobs end as in `train_adapters`, whose options these are.

    Raises TrainingError for a model of another base, for one that is given twice, and for recipes whose experts are no
    updates of linear layers; ScopeError for recipes that need the tasks of rows.
    """
    pace = Pace(steps, lr, batch_size, seed, warmup)
    require_steps(pace, jobs_per_batch)
    _require_apart(model, {name: made for name, (made, _) in jobs.items()})
    tasks = {name: own if isinstance(own, Task) else Task(list(own)) for name, (_, own) in jobs.items()}
    if empty := [name for name, task in tasks.items() if not task.examples]:
        raise TrainingError(f"job {empty[0]!r} has no examples")
    judging = Judging(held_out, evaluate_every, patience)
    judging.require(tasks)
    made = {name: ExpertJob(name, experts) for name, (experts, _) in jobs.items()}
    rows, judged = judging.parted(model, tokenizer, tasks, seed)
    planned = [
        PlannedJob(name, lambda job=job: job, _size(job), rows[name], pace, judged.get(name))  # type: ignore[misc]
        for name, job in made.items()
    ]
    modes = [(module, module.training) for experts, _ in jobs.values() for module in experts.modules()]
    try:
        with untouched(model), progress_bar(progress, field="loss") as bar:
            training = FusedTraining(
                model, tokenizer, planned, bar, jobs_per_batch=jobs_per_batch, memory_bytes=memory_bytes
            )
            return training.run(lambda *_: None)
    finally:
        for module, mode in modes:
            module.training = mode


def _require_apart(model: Any, models: Mapping[str, ExpertModel]) -> None:
    if not models:
        raise TrainingError("no expert models to train: pass a mapping of names to (model, examples)")
    seen: dict[int, str] = {}
    for name, made in models.items():
        if made.base_model is not model:
            raise TrainingError(
                f"job {name!r} is an expert model of another base: make it with lw.experts(recipe, this base)"
            )
        if id(made) in seen:
            raise TrainingError(f"jobs {seen[id(made)]!r} and {name!r} are one expert model: make one for each")
        seen[id(made)] = name


def _size(job: ExpertJob) -> int:
    return sum(parameter.numel() for parameter in job.parameters())
