"""Expert models on one base, trained in the same passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraweave.composer.batches import EncodedRow
from loraweave.composer.experts.beginning import began, determining, remembered
from loraweave.composer.experts.expert_job import ExpertJob
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.task_rows import TaskRow
from loraweave.composer.training.checkpoints import RunningState, load_finished, save_finished
from loraweave.composer.training.fused_training import FusedTraining
from loraweave.composer.training.held_out import HeldOut
from loraweave.composer.training.pace import Pace
from loraweave.composer.training.planned_job import PlannedJob
from loraweave.composer.training.training_job import TrainingJob
from loraweave.composer.training.training_report import JobReport, TrainingReport


@dataclass(frozen=True)
class Together:
    """`models` by the names of their jobs, with the `rows` that each learns from and is judged by.

    In `folder`, a checkpoint, is kept what jobs have ended with, and the state of those that run.
    """

    model: Any
    tokenizer: Any
    models: Mapping[str, ExpertModel]
    rows: Mapping[str, Sequence[EncodedRow]]
    held_out: Mapping[str, HeldOut]
    pace: Pace
    jobs_per_batch: int
    memory_bytes: int | None
    folder: Path | None

    def train(self, bar: Progress) -> TrainingReport:
        """What was done. A model that was finished before has what it had learned; it is not trained again."""
        if self.folder is None:
            return self._training(list(self.models), bar, None).run(lambda *_: None)
        begun = {name: began(model) for name, model in self.models.items()}
        keys = {name: self._key(name, begun[name]) for name in self.models}
        kept = RunningState(self.folder, keys, [self.jobs_per_batch, self.memory_bytes])
        running = kept.names()
        reports: dict[str, JobReport] = {}
        with ExitStack() as stack:
            for name, model in self.models.items():
                stack.enter_context(remembered(model, begun[name]))
                if name not in running and (finished := load_finished(self.folder, keys[name])) is not None:
                    tensors, reports[name] = finished
                    model.load_state_dict(tensors, strict=False)
            left = [name for name in self.models if name not in reports]

            def ended(job: TrainingJob, report: JobReport) -> None:
                assert self.folder is not None
                save_finished(self.folder, keys[job.name], self.models[job.name].expert_state(), report)

            report = self._training(left, bar, kept).run(ended) if left else TrainingReport()
        report.jobs = {name: (reports | report.jobs)[name] for name in self.models}
        return report

    def _training(self, names: Sequence[str], bar: Progress, kept: RunningState | None) -> FusedTraining:
        return FusedTraining(
            self.model,
            self.tokenizer,
            [self._planned(name) for name in names],
            bar,
            jobs_per_batch=self.jobs_per_batch,
            memory_bytes=self.memory_bytes,
            kept=kept,
        )

    def _planned(self, name: str) -> PlannedJob:
        rows = self.rows[name]
        # what is counted before the first step are rows of no task
        task = rows[0].task if isinstance(rows[0], TaskRow) and rows[0].task >= 0 else None
        job = ExpertJob(name, self.models[name], task=task, seed=self.pace.seed)
        size = sum(parameter.numel() for parameter in job.parameters())
        return PlannedJob(name, lambda: job, size, rows, self.pace, self.held_out.get(name))

    def _key(self, name: str, begun: str) -> str:
        """Of all that what a job ends with depends on."""
        model, held_out = self.models[name], self.held_out.get(name)
        learning = [each for each, parameter in model.expert_parameters().items() if parameter.requires_grad]
        judged = None if held_out is None else [list(map(asdict, held_out.rows)), held_out.every, held_out.patience]
        own = [name, model.recipe.name, determining(model, learning), begun, asdict(self.pace)]
        content = json.dumps([*own, list(map(asdict, self.rows[name])), judged], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]
