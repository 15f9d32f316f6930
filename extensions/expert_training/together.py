"""The training of several expert models on one base in the same passes."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave import Task, TrainingError, UnknownName, WeightingError
from loraweave.extend import BudgetExceeded, progress_bar, text_digest
from loraweave.extend.recipes import ExpertModel
from loraweave.extend.scoring import NO_TOKENIZER, EncodedRow, untouched
from loraweave.extend.training import (
    ExpertJob,
    HeldOut,
    JobReport,
    Judging,
    Pace,
    PlannedJob,
    RowReader,
    SharedReport,
    SharedTraining,
    TrainingJob,
    TrainingRow,
    TrainingState,
    caller_randomness,
    checkpoint_folder,
    is_empty,
    load_state,
    require_shareable,
    require_texts,
    save_state,
)
from loraweave.extensions.expert_training.feeds import owners_of, predicts_tokens
from loraweave.extensions.expert_training.identity import remember_start, start_digest, training_identity

FINISHED, TENSOR = "finished", "tensor."


def train_together(
    model: Any,
    tokenizer: Any,
    jobs: Mapping[str, tuple[ExpertModel, Any]],
    pace: Pace,
    judging: Judging,
    *,
    jobs_per_batch: int,
    memory_bytes: int | None,
    checkpoint: str | Path | None,
    progress: bool,
) -> SharedReport:
    """Train the expert models of `jobs`, {name: (model, rows)}, on one base, as `lw.train_experts` says; return a report."""
    _require_jobs(jobs)
    models = {name: made for name, (made, _) in jobs.items()}
    _require_apart(model, models)
    owners = {name: owners_of(made.recipe) for name, made in models.items()}

    readers = {name: RowReader(row_owners, model, tokenizer) for name, row_owners in owners.items()}
    all_rows = {name: readers[name].read(examples, what=f"job {name!r}") for name, (_, examples) in jobs.items()}

    def held(name: str, examples: Any) -> list[TrainingRow]:
        """Return a job's held-out `examples` as rows, in the prompts of the job's Task unless they are a Task themselves."""
        taught = jobs[name][1]
        reader = RowReader(owners[name].closed(), model, tokenizer)
        prompts: dict[str, Any] = {"task": taught} if isinstance(taught, Task) else {}
        return reader.read(examples, what=f"held_out[{name!r}]", **prompts)

    judging.require({name: len(job_rows) for name, job_rows in all_rows.items()})
    rows, judged = judging.split(all_rows, held, pace.seed)
    folder = checkpoint_folder(checkpoint)
    with ExitStack() as stack:
        stack.enter_context(caller_randomness())
        stack.enter_context(untouched(model))
        stack.enter_context(_with_tasks(models, {name: tuple(row_owners.places) for name, row_owners in owners.items()}))
        stack.enter_context(_in_their_modes(models.values()))
        bar = stack.enter_context(progress_bar(progress, field="loss"))
        texts = NO_TOKENIZER if tokenizer is None else tokenizer
        shared = SharedTraining(model, texts, bar, jobs_per_batch, memory_bytes, folder)
        return Together(shared, models, rows, judged, pace).train()


@contextmanager
def _with_tasks(models: Mapping[str, ExpertModel], tasks: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Give the models, by job, these task names within the block; restore the former ones after errors before training."""
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
    """Restore the mode (training or evaluation) of the models' modules after the block."""
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
        match job:
            case [ExpertModel(), examples]:
                if is_empty(examples):
                    raise TrainingError(f"job {name!r} has no examples")
            case _:
                raise TrainingError(
                    f"job {name!r} is a {type(job).__name__}, not a pair (model, examples) whose model lw.experts has made"
                )


def _require_apart(model: Any, models: Mapping[str, ExpertModel]) -> None:
    if not predicts_tokens(model):
        raise TrainingError(
            f"jobs share passes of a language model, and {type(model).__name__} is not one: fit() each model by itself"
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


@dataclass(frozen=True)
class Together:
    """A training of several models, by the names of their jobs, with the `rows` that each learns from and is judged by."""

    shared: SharedTraining
    models: Mapping[str, ExpertModel]
    rows: Mapping[str, Sequence[TrainingRow]]
    held_out: Mapping[str, HeldOut]
    pace: Pace

    def train(self) -> SharedReport:
        """Train the models and return the report. A model that was finished before is loaded, not trained again."""
        kept = self.shared.folder is not None
        begun = {name: start_digest(model) for name, model in self.models.items()} if kept else {}
        reports: dict[str, JobReport] = {}

        def load(folder: Path, name: str, key: str) -> bool:
            if (finished := load_finished(folder, key)) is not None:
                tensors, reports[name] = finished
                self.models[name].load_state_dict(tensors, strict=False)
            return finished is not None

        def save(folder: Path | None, key: str, job: TrainingJob, report: JobReport) -> None:
            if folder is not None:
                save_finished(folder, key, self.models[job.name].expert_state(), report)

        with ExitStack() as stack:
            for name in begun:
                stack.enter_context(remember_start(self.models[name], begun[name]))
            report = self.shared.train(self.models, self._plan, lambda name: self._key(name, begun[name]), load, save)
        report.jobs = {name: (reports | report.jobs)[name] for name in self.models}
        return report

    def _plan(self, name: str) -> PlannedJob:
        rows = self.rows[name]
        # what is counted before the first step are rows of no task
        task = rows[0].expert if rows[0].expert >= 0 else None
        job = ExpertJob(name, self.models[name], task=task, seed=self.pace.seed)
        size = sum(parameter.numel() for parameter in job.parameters())
        return PlannedJob(name, lambda: job, size, rows, self.pace, self.held_out.get(name))

    def _key(self, name: str, begun: str) -> str:
        """Return the digest of everything the job's result depends on."""
        model, held_out = self.models[name], self.held_out.get(name)
        learning = [path for path, parameter in model.expert_parameters().items() if parameter.requires_grad]
        judged = None if held_out is None else [list(map(_said, held_out.rows)), held_out.every, held_out.patience]
        parts = [name, model.recipe.name, training_identity(model, learning), begun, asdict(self.pace)]
        content = json.dumps([*parts, list(map(_said, self.rows[name])), judged], sort_keys=True)
        return text_digest(content)[:32]


def _said(row: EncodedRow) -> dict[str, Any]:
    """Return a row's contents, for JSON, as they enter a checkpoint's key."""
    assert isinstance(row, TrainingRow)
    return {"prompt": row.prompt, "target": row.target, "labels": row.labels, "task": row.expert}


def save_finished(folder: Path, key: str, tensors: Mapping[str, Tensor], report: JobReport) -> None:
    """Save a finished job's tensors and report in the checkpoint's folder, under the digest `key`."""
    kept = {f"{TENSOR}{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_state(folder, key, TrainingState(report.steps, kept, report.to_json()), place=FINISHED)


def load_finished(folder: Path, key: str) -> tuple[dict[str, Tensor], JobReport] | None:
    """Return the (tensors, report) that `save_finished` kept under `key`, or None; a damaged file is logged and ignored."""
    state = load_state(folder, key, place=FINISHED)
    if state is None:
        return None
    tensors = {name.removeprefix(TENSOR): value for name, value in state.tensors.items()}
    return tensors, JobReport.from_json(state.about)
