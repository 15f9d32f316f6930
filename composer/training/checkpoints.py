"""What a training keeps in its checkpoint folder: adapters that are finished, and the state of jobs that run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraweave.composer.training.training_report import JobReport
from loraweave.errors import LoraweaveError
from loraweave.hub.adapter import Adapter
from loraweave.retrieval.training_state import TrainingState, drop_state, load_state, save_state

logger = logging.getLogger(__name__)

FINISHED, REPORT, TENSOR = "finished", "report", "tensor."


def save_adapter(folder: Path, key: str, adapter: Adapter) -> None:
    adapter.save_pretrained(folder / FINISHED / key)


def load_adapter(folder: Path, key: str) -> Adapter | None:
    """The finished adapter of that key, or None; a damaged folder counts as none and is said."""
    path = folder / FINISHED / key
    if not path.is_dir():
        return None
    try:
        return Adapter.from_pretrained(path)
    except LoraweaveError as error:
        logger.warning("the finished adapter %s is damaged (%s); it is trained again", path, error)
        return None


def save_finished(folder: Path, key: str, tensors: Mapping[str, Tensor], report: JobReport) -> None:
    """Keeps the tensors that a job has ended with."""
    raw = torch.frombuffer(bytearray(json.dumps(report.to_json()).encode()), dtype=torch.uint8)
    kept = {f"{TENSOR}{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    state = TrainingState(report.steps, {"step": torch.tensor([report.steps]), REPORT: raw, **kept})
    save_state(folder, key, state, place=FINISHED)


def load_finished(folder: Path, key: str) -> tuple[dict[str, Tensor], JobReport] | None:
    """What `save_finished` kept below that key, or None; a damaged file counts as none and is said."""
    state = load_state(folder, key, place=FINISHED)
    if state is None:
        return None
    report = JobReport.from_json(json.loads(bytes(state.tensors.pop(REPORT).tolist())))
    return {name.removeprefix(TENSOR): value for name, value in state.tensors.items()}, report


@dataclass(frozen=True)
class RunningState:
    """The state of the jobs that run together; `keys` has for each job of a training a key of what its result depends on.

    A state is that of this very training: other jobs, or another way to share batches (`sharing`), make other neighbours.
    """

    folder: Path
    keys: Mapping[str, str]
    sharing: object

    @property
    def key(self) -> str:
        parts = [sorted(self.keys.values()), self.sharing]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def write(self, state: TrainingState) -> None:
        save_state(self.folder, self.key, state)

    def read(self) -> TrainingState | None:
        return load_state(self.folder, self.key)

    def names(self) -> set[str]:
        """The jobs that were running. They go on from there even if one has ended since, so that all do to the same bits."""
        state = self.read()
        running = set() if state is None else {key.split("/")[1] for key in state.tensors if "/" in key}
        return {name for name, key in self.keys.items() if key in running}

    def drop(self) -> None:
        drop_state(self.folder, self.key)
