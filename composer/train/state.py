"""What a training keeps: the reports of jobs that share passes, and the state in its checkpoint folder, in one file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from loraweave.common.names import text_digest
from loraweave.common.state import TrainingState, checkpoint_folder, load_state, save_state
from loraweave.composer.train.settings import TrainingSettings
from loraweave.errors import LoraweaveError
from loraweave.hub.adapter import Adapter
from loraweave.routers.tokens._learned import TrainingReport


@dataclass(frozen=True)
class JobReport:
    """The report of a job's steps: how many, the step whose parameters were kept, and why it ended.

    `losses` has the training loss before each step, `held_out` pairs of a step and the held-out loss after it.
    """

    steps: int
    best_step: int
    stopped: str
    num_tokens: int
    losses: tuple[float, ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, for an adapter's card."""
        return {**asdict(self), "losses": list(self.losses), "held_out": [list(point) for point in self.held_out]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> JobReport:
        points = tuple((int(step), float(loss)) for step, loss in values["held_out"])
        return cls(**{**values, "losses": tuple(values["losses"]), "held_out": points})


@dataclass
class SharedReport:
    """The report of the whole run; jobs that a checkpoint had finished before are among `jobs`, and not in the sums.

    `num_tokens` are the rows' own and `num_computed` those with padding, `seconds` is the time of the steps without
    evaluations. `estimated_bytes` is the memory model's largest step, `peak_bytes` what was in use at most, base and all: on
    a CPU of the whole process, and None where it had used more before.
    """

    jobs: dict[str, JobReport] = field(default_factory=dict)
    num_tokens: int = 0
    num_computed: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    estimated_bytes: int = 0
    peak_bytes: int | None = None

    @classmethod
    def of(cls, reports: Sequence[SharedReport]) -> SharedReport:
        """Return the sums of reports, and the largest of their bytes; no job is among them."""
        total = cls()
        for report in reports:
            for count in ("num_tokens", "num_computed", "num_steps", "seconds"):
                setattr(total, count, getattr(total, count) + getattr(report, count))
        total.estimated_bytes = max((report.estimated_bytes for report in reports), default=0)
        total.peak_bytes = max((report.peak_bytes for report in reports if report.peak_bytes is not None), default=None)
        return total

    def note_jobs(self, adapters: Mapping[str, Adapter]) -> None:
        """Read the jobs from the adapters' cards; cards of other versions may say nothing of the training."""
        told = {name: adapter.card["training"] for name, adapter in adapters.items() if "training" in adapter.card}
        self.jobs = {name: JobReport.from_json(values) for name, values in told.items()}

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """The share of computed tokens that are padding, from 0 to 1."""
        return 1 - self.num_tokens / self.num_computed if self.num_computed else 0.0

    def __str__(self) -> str:
        measured = "" if self.peak_bytes is None else f", {self.peak_bytes / 1e9:.2f} GB measured"
        lines = [
            f"{self.num_steps} shared steps in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens a second, "
            f"{self.padding:.0%} padding; peak {self.estimated_bytes / 1e9:.2f} GB estimated{measured}"
        ]
        for name, job in self.jobs.items():
            kept = "" if job.best_step == job.steps else f", best after {job.best_step}"
            lines.append(f"{name}: {job.steps} steps{kept}; {job.stopped}")
        return "\n".join(lines)


class TrainedAdapters(dict[str, Adapter]):
    """A mapping {task name: Adapter} with the training's `report`."""

    def __init__(self, adapters: Mapping[str, Adapter], report: SharedReport) -> None:
        super().__init__(adapters)
        self.report = report


BEST, RECENT, MOVED = "best", "recent", "moved"


@dataclass(frozen=True)
class KeptState:
    """The place of the state of one call of fit(): in `folder`, if there is one, under a key of all that determines it."""

    folder: Path | None
    key: str

    @classmethod
    def of(
        cls, name: str, identity: Sequence[Any], settings: TrainingSettings, rows: Sequence[Any], held: Sequence[Any]
    ) -> Self:
        """Return the place for a training of `identity`, which is what is trained, as JSON; so is the identity of each row.

        Raises TrainingError if the folder cannot be made.
        """
        if settings.checkpoint is None:
            return cls(None, "")
        folder = checkpoint_folder(settings.checkpoint)
        data = [[row.identity() for row in part] for part in (rows, held)]
        parts = [name, *identity, settings.identity(), data]
        digest = text_digest(json.dumps(parts, sort_keys=True))
        return cls(folder, f"{name}-{digest[:24]}")

    def save(
        self,
        step: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        best: Sequence[Tensor],
        recent: Sequence[Tensor],
        report: TrainingReport,
        moved: Sequence[Tensor] = (),
    ) -> None:
        """Save the state, visible only when complete. A full disk is logged and does not end the training."""
        if self.folder is None:
            return
        tensors = TrainingState.of(step, parameters, optimizer).tensors
        for part, values in ((BEST, best), (RECENT, recent), (MOVED, moved)):
            tensors |= {f"{index}.{part}": value.detach() for index, value in enumerate(values)}
        save_state(self.folder, self.key, TrainingState(step, tensors, report.to_json()))

    def restore(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, moved: Sequence[Tensor] = ()
    ) -> tuple[int, list[Tensor], list[Tensor], TrainingReport] | None:
        """Restore the state; return (steps done, best parameters, recent loads, report), or None where there is none."""
        state = None if self.folder is None else load_state(self.folder, self.key)
        if state is None:
            return None
        step = state.restore(parameters, optimizer)
        put_values(_numbered(state, MOVED), moved)
        return step, _numbered(state, BEST), _numbered(state, RECENT), TrainingReport.from_json(state.about)


def _numbered(state: TrainingState, part: str) -> list[Tensor]:
    names = (name for name in state.tensors if name.endswith(f".{part}"))
    return [state.tensors[name] for name in sorted(names, key=lambda name: int(name.partition(".")[0]))]


logger = logging.getLogger(__name__)

FINISHED, TENSOR = "finished", "tensor."


def save_adapter(folder: Path, key: str, adapter: Adapter) -> None:
    """Keep the adapter that a job has ended with, for `load_adapter`."""
    adapter.save_pretrained(folder / FINISHED / key)


def load_adapter(folder: Path, key: str) -> Adapter | None:
    """Return the finished adapter of that key, or None; a damaged folder is logged and counts as none."""
    path = folder / FINISHED / key
    if not path.is_dir():
        return None
    try:
        return Adapter.from_pretrained(path)
    except LoraweaveError as error:
        logger.warning("the finished adapter %s is damaged (%s); it is trained again", path, error)
        return None


def save_finished(folder: Path, key: str, tensors: Mapping[str, Tensor], report: JobReport) -> None:
    """Keep the tensors that a job has ended with."""
    kept = {f"{TENSOR}{name}": value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_state(folder, key, TrainingState(report.steps, kept, report.to_json()), place=FINISHED)


def load_finished(folder: Path, key: str) -> tuple[dict[str, Tensor], JobReport] | None:
    """Return what `save_finished` kept under that key, or None; a damaged file is logged and counts as none."""
    state = load_state(folder, key, place=FINISHED)
    if state is None:
        return None
    tensors = {name.removeprefix(TENSOR): value for name, value in state.tensors.items()}
    return tensors, JobReport.from_json(state.about)


@dataclass
class Best:
    """The parameters with the lowest held-out loss, and how many evaluations were no better since."""

    loss: float = math.inf
    values: Sequence[Tensor] = ()
    waited: int = 0

    def judge(self, loss: float, parameters: Iterable[Tensor]) -> bool:
        """Return whether this loss is the lowest so far; if so, keep these parameters as the best, else count a wait."""
        if not loss < self.loss:
            self.waited += 1
            return False
        self.loss, self.values, self.waited = loss, copy_values(parameters), 0
        return True

    @classmethod
    def again(cls, losses: Iterable[float], values: Sequence[Tensor]) -> Self:
        """Return the state after these losses, whose best parameters have these values."""
        best = cls()
        for loss in losses:
            best.judge(loss, ())
        best.values = values
        return best


def copy_values(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of the parameters' values."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put_values(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Give the parameters these values."""
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
