"""The reports of jobs that share passes: their steps, losses and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
