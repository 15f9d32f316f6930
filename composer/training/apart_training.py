"""Trains each task's adapter as if it were alone, several in each step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.checkpoints import RunningState, load_adapter, save_adapter
from loraweave.composer.training.fused_jobs import lora_job
from loraweave.composer.training.fused_training import FusedTraining
from loraweave.composer.training.held_out import HeldOut
from loraweave.composer.training.lora_job import LoraJob
from loraweave.composer.training.planned_job import PlannedJob
from loraweave.composer.training.training_job import TrainingJob
from loraweave.composer.training.training_recipe import Recipe
from loraweave.composer.training.training_report import JobReport, TrainedAdapters, TrainingReport
from loraweave.hub.adapter import Adapter
from loraweave.types import Fingerprint, Task

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
