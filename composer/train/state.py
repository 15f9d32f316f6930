"""Reports and checkpointed state of training jobs that share passes through the base."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from loraweave.common.descent import Descent, FlatParameters, TrainingState
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.jobs import Pace, TrainingJob
from loraweave.composer.train.rows import HeldOut
from loraweave.errors import LoraweaveError
from loraweave.hub.adapter import Adapter


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
        return {**asdict(self), "losses": list(self.losses), "held_out": list(map(list, self.held_out))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> JobReport:
        points = tuple((int(step), float(loss)) for step, loss in values["held_out"])
        return cls(**{**values, "losses": tuple(values["losses"]), "held_out": points})


@dataclass
class SharedReport:
    """The report of a shared training; jobs that a checkpoint had finished are among `jobs`, but not in the sums.

    `num_tokens` excludes padding and `num_computed` includes it; `seconds` is the time of the steps without evaluations.
    `estimated_bytes` is the memory model's largest step, `peak_bytes` the most bytes in use, base included: on a CPU those
    of the whole process, and None where the process had used more before.
    """

    jobs: dict[str, JobReport] = field(default_factory=dict)
    num_tokens: int = 0
    num_computed: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    estimated_bytes: int = 0
    peak_bytes: int | None = None

    def note_jobs(self, adapters: Mapping[str, Adapter]) -> None:
        """Add the jobs' reports from the adapters' cards; a card of another version may have none."""
        for name, adapter in adapters.items():
            if "training" in adapter.card:
                self.jobs[name] = JobReport.from_json(adapter.card["training"])

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


logger = logging.getLogger(__name__)

FINISHED = "finished"


def save_adapter(folder: Path, key: str, adapter: Adapter) -> None:
    """Save a finished job's adapter in the checkpoint folder, for `load_adapter`."""
    adapter.save_pretrained(folder / FINISHED / key)


def load_adapter(folder: Path, key: str) -> Adapter | None:
    """Return the finished adapter saved under `key`, or None; a damaged folder is logged and counts as None."""
    path = folder / FINISHED / key
    if not path.is_dir():
        return None
    try:
        return Adapter.from_pretrained(path)
    except LoraweaveError as error:
        logger.warning("the finished adapter %s is damaged (%s); it is trained again", path, error)
        return None


@dataclass
class Best:
    """The parameters with the lowest held-out loss, and how many evaluations since then were not better."""

    loss: float = math.inf
    values: Sequence[Tensor] = ()
    waited: int = 0

    def judge(self, loss: float, parameters: Iterable[Tensor]) -> bool:
        """Return True if this loss is the lowest so far; if so, keep these parameters as the best, else count a wait."""
        if not loss < self.loss:
            self.waited += 1
            return False
        self.loss, self.values, self.waited = loss, copy_values(parameters), 0
        return True

    @classmethod
    def again(cls, losses: Iterable[float], values: Sequence[Tensor]) -> Self:
        """Return the state after evaluations with these held-out losses, in order; `values` are the best parameters."""
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
    """Copy the values into the parameters, in place."""
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)


@dataclass(frozen=True)
class JobSize:
    """The size of a job's part of a step: `num_rows` rows, padded to `width` tokens on average in the job's own batches.

    `longest` and `longest_target` are tokens of its longest rows. `num_parameters` are trained, and memory holds
    `num_copies` tensors of that size: values, gradients, AdamW's two moments, and the best values so far where they are
    kept.
    """

    num_rows: int
    width: float
    longest: int
    longest_target: int
    num_parameters: int
    num_copies: int = 4


# the number of a job's batches whose widths are averaged
MEASURED_STEPS = 32
# values, gradients and the two moments of AdamW
NUM_COPIES = 4


@dataclass(frozen=True)
class PlannedJob:
    """A job of `num_parameters` that `make` builds when its turn comes; `pace` determines its rows and learning rate."""

    name: str
    make: Callable[[], TrainingJob]
    num_parameters: int
    rows: Sequence[EncodedRow]
    pace: Pace
    held_out: HeldOut | None = None

    def size(self, model: Any) -> JobSize:
        """Return the size that the job will add to a step of the model."""
        seen = [*self.rows, *(() if self.held_out is None else self.held_out.rows)]
        steps = range(min(self.pace.steps, MEASURED_STEPS))
        widths = [max(map(len, self.pace.rows(self.rows, self.name, step))) for step in steps]
        return JobSize(
            num_rows=self.pace.batch_size,
            width=sum(widths) / len(widths),
            longest=max([len(row.prompt) if model.config.is_encoder_decoder else len(row) for row in seen]),
            longest_target=max([len(row.target) for row in seen]),
            num_parameters=self.num_parameters,
            num_copies=NUM_COPIES + (self.held_out is not None),
        )


ALL_STEPS = "all steps"


class JobProgress:
    """A running job. Its state depends on its own losses alone, so jobs that leave or join its batch do not change it."""

    def __init__(self, planned: PlannedJob) -> None:
        self.planned = planned
        self.job = planned.make()
        self.step = 0
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.num_tokens = 0
        self._best = Best()
        self._flat = FlatParameters(self.job.parameters())
        # the trained parameters, flattened
        self.vectors = self._flat.vectors
        # on a GPU a fused AdamW needs its step count on the GPU
        is_on_cpu = {vector.device.type for vector in self.vectors} == {"cpu"}
        self._descent = Descent(self.vectors, planned.pace.rate, fused=is_on_cpu)

    def take_step(self, loss: float, num_tokens: int) -> None:
        """Take an optimizer step with the gradient, clipped to norm 1, then zero it; note loss and tokens."""
        self._descent.step(self.step)
        self._flat.zero_grad()
        self.step += 1
        self.losses.append(loss)
        self.num_tokens += num_tokens

    @property
    def due(self) -> bool:
        """True if the held-out rows are to be evaluated now."""
        plan = self.planned.held_out
        if plan is None or (self.held_out and self.held_out[-1][0] == self.step):
            return False
        return self.step % plan.every == 0 or self.step == self.planned.pace.steps

    def note_evaluation(self, loss: float) -> None:
        """Note the held-out loss after this step, and keep the parameters if it is the lowest since training began."""
        self.held_out.append((self.step, loss))
        if self.step:
            self._best.judge(loss, self.vectors)

    @property
    def stopped(self) -> str | None:
        """The reason why the job ends here; None while it goes on."""
        patience = None if self.planned.held_out is None else self.planned.held_out.patience
        if patience is not None and self._best.waited >= patience:
            return f"no lower held-out loss in {patience} evaluations"
        return ALL_STEPS if self.step >= self.planned.pace.steps else None

    def finish(self) -> JobReport:
        """Set the job's parameters to the best evaluated ones, if any; return its report."""
        best_step = self.step
        if self._best.values:
            put_values(self._best.values, self.vectors)
            best_step = next(step for step, loss in self.held_out if step and loss == self._best.loss)
        points = tuple(self.losses), tuple(self.held_out)
        return JobReport(self.step, best_step, self.stopped or "", self.num_tokens, *points)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `restore` resumes the job to the same bits."""
        # before its first step an optimiser has no moments
        begun = TrainingState.of(self.step, self.vectors, self._descent.optimizer).tensors if self.step else {}
        best = {f"best.{index}": tensor for index, tensor in enumerate(self._best.values)}
        points = torch.tensor([list(point) for point in self.held_out], dtype=torch.float64).view(-1, 2)
        losses = torch.tensor(self.losses, dtype=torch.float64)
        counts = {"step": torch.tensor([self.step]), "num_tokens": torch.tensor([self.num_tokens])}
        return {**begun, **best, **counts, "held_out": points, "losses": losses}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume the job from the tensors that `state` returned."""
        self.step, self.num_tokens = int(state["step"]), int(state["num_tokens"])
        self.losses = state["losses"].tolist()
        self.held_out = [(int(step), loss) for step, loss in state["held_out"].tolist()]
        if self.step:
            TrainingState(self.step, dict(state)).restore(self.vectors, self._descent.optimizer)
        values = []
        if "best.0" in state:
            values = [state[f"best.{index}"].to(vector.device) for index, vector in enumerate(self.vectors)]
        self._best = Best.again([loss for step, loss in self.held_out if step], values)
