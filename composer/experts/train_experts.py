"""Trains several expert models on one base in the same passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loraweave.composer.experts.expert_job import require_shareable
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.task_rows import JobRows
from loraweave.composer.experts.tensor_rows import predicts_tokens
from loraweave.composer.experts.together import Together
from loraweave.composer.router_training.passes import NO_TOKENIZER
from loraweave.composer.training.caller_randomness import caller_randomness
from loraweave.composer.training.held_out import Judging
from loraweave.composer.training.pace import WARMUP_STEPS, Pace
from loraweave.composer.training.training_recipe import require_memory, require_steps, require_texts
from loraweave.composer.training.training_report import TrainingReport
from loraweave.composer.untouched import untouched
from loraweave.errors import BudgetExceeded, TrainingError, UnknownName, WeightingError
from loraweave.hub.progress import progress_bar
from loraweave.retrieval.training_state import checkpoint_folder


def train_experts(
    model: Any,
    tokenizer: Any,
    jobs: Mapping[str, tuple[ExpertModel, Any]],
    *,
    steps: int = 60,
    lr: float = 3e-3,
    batch_size: int = 8,
    warmup: int = WARMUP_STEPS,
    seed: int = 0,
    jobs_per_batch: int = 4,
    held_out: float | Mapping[str, Any] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    memory_bytes: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TrainingReport:
    """What the training of expert models (`lw.experts`) on this base did; the models are trained where they are.

    Each has experts and gates of its own and learns from its own examples, which are what `ExpertModel.fit` takes as a
    dataset, rows with tasks among them, by the loss of `train_adapters` and the losses of its recipe, with the gradients of
    being trained alone: AdamW without weight decay, clipped to norm 1. Rows share passes and jobs end as in
    `train_adapters`, whose options these are. With `checkpoint`, the same call goes on where it was interrupted, with models
    as they were before the first or as the interrupted call left them.

    Raises TrainingError for a model of another base, for one that is given twice, and for recipes whose experts are no
    updates of linear layers; InvalidTask for rows that cannot be used, or are of no task where the recipe needs it,
    UnknownName for tasks that it has not.
    """
    pace = Pace(steps, lr, batch_size, seed, warmup)
    require_steps(pace, jobs_per_batch)
    require_memory(memory_bytes)
    _require_jobs(jobs)
    models = {name: made for name, (made, _) in jobs.items()}
    _require_apart(model, models)
    readers = {name: JobRows(name, made, tokenizer) for name, made in models.items()}
    given = {name: readers[name].read(examples) for name, (_, examples) in jobs.items()}
    judging = Judging(held_out, evaluate_every, patience)
    judging.require({name: len(own) for name, own in given.items()})
    rows, judged = judging.parted(given, lambda name, examples: readers[name].held_out(examples), seed)
    folder = checkpoint_folder(checkpoint)
    with ExitStack() as stack:
        stack.enter_context(caller_randomness())
        stack.enter_context(untouched(model))
        stack.enter_context(_with_tasks(models, {name: reader.tasks for name, reader in readers.items()}))
        stack.enter_context(_in_their_modes(models.values()))
        bar = stack.enter_context(progress_bar(progress, field="loss"))
        texts = NO_TOKENIZER if tokenizer is None else tokenizer
        return Together(model, texts, models, rows, judged, pace, jobs_per_batch, memory_bytes, folder).train(bar)


@contextmanager
def _with_tasks(models: Mapping[str, ExpertModel], tasks: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """The models have these tasks; they have their own again after errors that come before the first step."""
    before = {name: made.tasks for name, made in models.items()}
    try:
        for name, made in models.items():
            if made.tasks != tasks[name]:
                made.take_tasks(tasks[name])
        yield
    except (WeightingError, UnknownName, BudgetExceeded):
        for name, made in models.items():
            if made.tasks != before[name]:
                made.take_tasks(before[name])
        raise


@contextmanager
def _in_their_modes(models: Iterable[ExpertModel]) -> Iterator[None]:
    """After it, all modules are in the modes in which they were."""
    modes = [(module, module.training) for made in models for module in made.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _require_jobs(jobs: Any) -> None:
    if not isinstance(jobs, Mapping) or not jobs:
        raise TrainingError("no expert models to train: pass a mapping of names to (model, examples)")
    require_texts("job", jobs)
    for name, job in jobs.items():
        if not isinstance(job, tuple | list) or len(job) != 2 or not isinstance(job[0], ExpertModel):
            raise TrainingError(
                f"job {name!r} is no pair (model, examples) whose model lw.experts has made, but a {type(job).__name__}"
            )


def _require_apart(model: Any, models: Mapping[str, ExpertModel]) -> None:
    if not predicts_tokens(model):
        raise TrainingError(
            f"jobs share passes of a language model's tokens, and {type(model).__name__} is none: fit() each model by itself"
        )
    seen: dict[int, str] = {}
    for name, made in models.items():
        if made.base_model is not model:
            raise TrainingError(
                f"job {name!r} is an expert model of another base: make it with lw.experts(recipe, this base)"
            )
        if id(made) in seen:
            raise TrainingError(f"jobs {seen[id(made)]!r} and {name!r} are one expert model: make one for each")
        seen[id(made)] = name
        made.require_trainable()
        require_shareable(name, made)
