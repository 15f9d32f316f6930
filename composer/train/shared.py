"""The schedule of many jobs on one frozen base: which jobs share each step, until all have ended."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from loraweave.common.descent import Processes, TrainingState, backward, drop_state, load_state, save_state
from loraweave.common.names import text_digest
from loraweave.composer.model.batches import IGNORED, EncodedRow, batch
from loraweave.composer.train.jobs import LoraJob, SharedPass, TrainingJob, range_losses, row_losses
from loraweave.composer.train.state import JobProgress, JobReport, JobSize, PlannedJob, SharedReport
from loraweave.errors import PackageMissing, TrainingError
from loraweave.registry import bringing

CHECKPOINT_STEPS = 20


Fits = Callable[[Sequence[JobSize]], bool]


def groups(sizes: Mapping[str, JobSize], jobs_per_batch: int, fits: Fits) -> list[list[str]]:
    """Return all jobs, shortest first, in the fewest groups, and among such groupings the one that computes fewest tokens.

    A group has at most `jobs_per_batch` jobs that fit together, padded to the width of its widest job. Jobs adjacent in
    length are together; jobs of equal length keep their order. Each job must fit alone.
    """
    names = sorted(sizes, key=lambda name: sizes[name].width)
    # of the first n jobs: (groups, tokens, where the last group begins)
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for end in range(1, len(names) + 1):
        candidates = []
        for start in range(end - 1, max(0, end - jobs_per_batch) - 1, -1):
            members = [sizes[name] for name in names[start:end]]
            if len(members) > 1 and not fits(members):
                break
            tokens = sum([size.num_rows for size in members]) * members[-1].width
            candidates.append((best[start][0] + 1, best[start][1] + tokens, start))
        best.append(min(candidates))
    cuts = [len(names)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][2])
    return [names[start:end] for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]


def successor(waiting: Mapping[str, JobSize], running: Sequence[JobSize], fits: Fits) -> str | None:
    """Return the waiting job that fits beside the running ones and is nearest in length to them, if any."""
    mean = sum(size.width for size in running) / len(running)
    nearest = sorted(waiting, key=lambda name: (abs(waiting[name].width - mean), waiting[name].width))
    return next((name for name in nearest if fits([*running, waiting[name]])), None)


class StepMemory:
    """The base class of estimates of a step's memory: without a `budget`, in bytes, all jobs fit."""

    budget: int | None = None

    def peak(self, jobs: Sequence[JobSize]) -> int:
        """Return the bytes that a step of these jobs together takes, the base's weights included."""
        return 0

    def fits(self, jobs: Sequence[JobSize]) -> bool:
        """Return True if these jobs may share a step."""
        return self.budget is None or self.peak(jobs) <= self.budget

    def require(self, jobs: Mapping[str, JobSize]) -> None:
        """Raise BudgetExceeded for a job that does not fit alone; start measuring memory for `measured`."""

    def measured(self) -> int | None:
        """Return the most bytes in use since `require` was called, the base's weights included; None if unknown."""
        return None


def step_memory(
    model: Any, tokenizer: Any, job: TrainingJob, allowed: int | None, *, share: Callable[[int | None], int | None]
) -> StepMemory:
    """Return an extension's estimate of the memory that steps take; without an extension, one that fits all jobs.

    `job` represents the jobs to come. A step may take `allowed` bytes; if None, `share(free)` bytes, where `free` is the
    device's free memory or None if unknown. Raises PackageMissing for `allowed` bytes that no extension can estimate.
    """
    module = next(bringing("step_memory"), None)
    if module is not None:
        memory: StepMemory = module.EstimatedMemory(model, tokenizer, job, allowed, share=share)
        return memory
    if allowed is not None:
        raise PackageMissing("memory_bytes limits steps by an estimate, which none of the extensions at hand makes")
    return StepMemory()


# called with each job that has ended
Ended = Callable[[TrainingJob, JobReport], None]


@dataclass
class SharedTraining:
    """A training of jobs in groups of similar length; when a job ends before its group, a waiting job takes its place.

    A job is admitted if the whole step, base included, fits `memory_bytes` as `step_memory` estimates it; by default, the
    device's free memory. Sharing steps changes a job's result by no more than the rounding of its batch: its rows are a
    function of its seed, name and step, its gradient is its own, and it ends by its own losses. With a checkpoint `folder`,
    the state of all running jobs is written after every CHECKPOINT_STEPS steps and whenever a job ends, and the same
    training resumes from there, with the same jobs sharing steps, to the same bits.
    """

    model: Any
    tokenizer: Any
    bar: Progress
    jobs_per_batch: int
    memory_bytes: int | None
    folder: Path | None
    report: SharedReport = field(default_factory=SharedReport, init=False)
    _keys: dict[str, str] = field(default_factory=dict, init=False)
    _running: list[JobProgress] = field(default_factory=list, init=False)
    _capacity: int = field(default=0, init=False)

    def train(
        self,
        names: Iterable[str],
        plan: Callable[[str], PlannedJob],
        key: Callable[[str], str],
        load: Callable[[Path, str, str], bool],
        save: Callable[[Path | None, str, TrainingJob, JobReport], None],
    ) -> SharedReport:
        """Train the jobs that the checkpoint has not finished; return the report, whose `jobs` are those trained now.

        `key` returns the hash of everything a job's result depends on. A job is finished if `load(folder, name, key)`
        returns True; `save(folder, key, job, report)` is called when a job has ended, with None if there is no folder.
        Raises BudgetExceeded before the first step for a job that does not fit alone, TrainingError for a loss that is not
        finite; jobs that had ended before are saved.
        """
        names = list(names)
        self._keys = {name: "" if self.folder is None else key(name) for name in names}
        state = None if self.folder is None else load_state(self.folder, self._key)
        # resume all jobs of the saved state, even one that has finished since, so that the others get the same bits
        running = set() if state is None else {head.split("/")[1] for head in state.tensors if "/" in head}
        left = [
            name
            for name in names
            if self.folder is None or self._keys[name] in running or not load(self.folder, name, self._keys[name])
        ]
        if not left:
            return self.report
        self._waiting = {name: plan(name) for name in left}
        self._sizes = {name: job.size(self.model) for name, job in self._waiting.items()}
        self.processes = Processes.launched(next(self.model.parameters()).device)
        count = self.processes.count
        for name, job in self._waiting.items():
            if job.pace.batch_size % count:
                raise TrainingError(
                    f"job {name!r} has steps of {job.pace.batch_size} rows, which do not divide among {count} launched "
                    f"processes: take a batch_size that is a multiple of {count}"
                )
        folder = None if self.processes.rank else self.folder
        self._run(state, lambda job, report: save(folder, self._keys[job.name], job, report))
        # all processes may read the first one's files from here on
        self.processes.wait()
        return self.report

    def _run(self, state: TrainingState | None, ended: Ended) -> None:
        job = max(self._waiting.values(), key=attrgetter("num_parameters")).make()
        least = self.processes.least
        self._memory = step_memory(self.model, self.tokenizer, job, self.memory_bytes, share=least)
        self._memory.require(self._sizes)
        self._total = sum(job.pace.steps for job in self._waiting.values())
        shown = self.bar.add_task("", total=self._total, loss="")
        if state is not None:
            self._resume(state)
        if self.processes.count > 1:
            self._require_alike(self._running)
        while self._running or self._waiting:
            self._admit()
            self._show(shown)
            self._step()
            self._evaluate()
            keeps = self._leave(ended) or self.report.num_steps % CHECKPOINT_STEPS == 0
            if keeps and self.folder is not None and not self.processes.rank and (self._running or self._waiting):
                self._save()
        self.bar.update(shown, completed=self._total)
        self.report.peak_bytes = self._memory.measured()
        if self.folder is not None and not self.processes.rank:
            drop_state(self.folder, self._key)

    @property
    def _key(self) -> str:
        """The key of this training's saved state; it depends on all jobs and on the limits of sharing."""
        return text_digest(repr([sorted(self._keys.values()), [self.jobs_per_batch, self.memory_bytes]]))[:32]

    def _admit(self) -> None:
        """Start waiting jobs: a new group when no job runs, else successors of the jobs that have ended."""
        while self._waiting and not (self._running and len(self._running) >= self._capacity):
            waiting = {name: self._sizes[name] for name in self._waiting}
            if not self._running:
                names = groups(waiting, self.jobs_per_batch, self._memory.fits)[0]
                self._capacity = len(names)
            else:
                running = [self._sizes[run.planned.name] for run in self._running]
                name = successor(waiting, running, self._memory.fits)
                if name is None:
                    break
                names = [name]
            begun = [JobProgress(self._waiting.pop(name)) for name in names]
            if self.processes.count > 1:
                self._require_alike(begun)
            self._running += begun
            self._evaluate()
            peak = self._memory.peak([self._sizes[run.planned.name] for run in self._running])
            self.report.estimated_bytes = max(self.report.estimated_bytes, peak)

    def _require_alike(self, runs: Sequence[JobProgress]) -> None:
        """Raise TrainingError if the launched processes cannot share these jobs, or do not all have the same ones."""
        if strange := [run.planned.name for run in runs if not isinstance(run.job, LoraJob)]:
            raise TrainingError(
                f"job {strange[0]!r} is a model of experts, and several in one pass are trained in one process: fit() each "
                "of them in the launched ones"
            )
        said = repr([(run.planned.name, run.planned.pace, run.planned.rows, run.step) for run in runs])
        self.processes.require_alike("jobs", said, [vector for run in runs for vector in run.vectors])

    def _step(self) -> None:
        started = time.perf_counter()
        chosen = [run.planned.pace.rows(run.planned.rows, run.planned.name, run.step) for run in self._running]
        rows = list(chain.from_iterable(chosen))
        total_J = self._losses(chosen)
        steps = {f"job {run.planned.name!r}": run.step for run in self._running}
        values = backward(total_J, steps, whole_J=self.processes.sum(total_J))
        for run, job_rows, value in zip(self._running, chosen, values, strict=True):
            self.processes.sum_gradients(run.vectors)
            run.take_step(value, sum(map(len, job_rows)))
        self.report.seconds += time.perf_counter() - started
        self.report.num_steps += 1
        self.report.num_tokens += sum(map(len, rows))
        width = max(map(len, rows))
        if self.model.config.is_encoder_decoder:
            width = max(len(row.prompt) for row in rows) + max(len(row.target) for row in rows)
        self.report.num_computed += len(rows) * width

    def _losses(self, chosen: Sequence[Sequence[EncodedRow]]) -> Tensor:
        """Return loss_J, each job's mean target loss plus its penalty; each of several processes returns a share of it."""
        own_J = [self.processes.share(rows) for rows in chosen]
        counts = [len(part) for part in own_J]
        for run, job_rows in zip(self._running, own_J, strict=True):
            run.job.take(job_rows, run.step)
        with SharedPass(self.model, [run.job for run in self._running], counts):
            losses_J = range_losses(self.model, self.tokenizer, [row for part in own_J for row in part], counts)
            penalties = [run.job.penalty() for run in self._running]
        if self.processes.count > 1:
            shares = [_num_targets(part) / _num_targets(rows) for part, rows in zip(own_J, chosen, strict=True)]
            losses_J = losses_J * losses_J.new_tensor(shares)
        if self.processes.rank:
            # the first process adds the penalties
            return losses_J
        pairs = zip(losses_J, penalties, strict=True)
        return torch.stack([loss if penalty is None else loss + penalty for loss, penalty in pairs])

    def _evaluate(self) -> None:
        """Evaluate the held-out loss of every running job that is due."""
        if due := [run for run in self._running if run.due]:
            for run, loss in zip(due, held_out_losses(self.model, self.tokenizer, due), strict=True):
                run.note_evaluation(loss)

    def _leave(self, ended: Ended) -> bool:
        """Remove the jobs that have ended; return whether there were any."""
        over = [run for run in self._running if run.stopped is not None]
        for run in over:
            self.report.jobs[run.planned.name] = run.finish()
            ended(run.job, self.report.jobs[run.planned.name])
        self._running = [run for run in self._running if run.stopped is None]
        return bool(over)

    def _show(self, shown: TaskID) -> None:
        # compose() calls its job for all examples `all`
        names = ", ".join(["on all examples" if run.planned.name == "all" else run.planned.name for run in self._running])
        # the steps that a job skipped by ending early count as done
        ahead = sum([run.planned.pace.steps - run.step for run in self._running])
        ahead += sum([job.pace.steps for job in self._waiting.values()])
        losses = [run.losses[-1] for run in self._running if run.losses]
        mean = f"loss {sum(losses) / len(losses):.3f}, " if losses else ""
        text = f"{mean}{self.report.tokens_per_second:,.0f} tokens/s" if self.report.seconds else ""
        self.bar.update(shown, description=f"training {names}", completed=self._total - ahead, loss=text)

    def _save(self) -> None:
        assert self.folder is not None
        tensors = {"capacity": torch.tensor(self._capacity)}
        for place, run in enumerate(self._running):
            prefix = f"{place:04d}/{self._keys[run.planned.name]}/"
            tensors |= {prefix + key: tensor for key, tensor in run.state().items()}
        save_state(self.folder, self._key, TrainingState(self.report.num_steps, tensors))

    def _resume(self, state: TrainingState) -> None:
        names = {key: name for name, key in self._keys.items()}
        self._capacity = int(state.tensors["capacity"])
        for head in sorted({key.rsplit("/", 1)[0] for key in state.tensors if "/" in key}):
            run = JobProgress(self._waiting.pop(names[head.split("/")[1]]))
            run.restore({key.rsplit("/", 1)[1]: t for key, t in state.tensors.items() if key.startswith(f"{head}/")})
            self._running.append(run)


def _num_targets(rows: Sequence[EncodedRow]) -> int:
    return sum(label != IGNORED for row in rows for label in row.labels)


@torch.no_grad()
def held_out_losses(model: Any, tokenizer: Any, due: Sequence[JobProgress]) -> list[float]:
    """Return each job's mean loss over the target tokens of its held-out rows, run in batches of the job's batch size."""
    waiting = {run: list(run.planned.held_out.rows) for run in due if run.planned.held_out is not None}
    totals, counts = dict.fromkeys(due, 0.0), dict.fromkeys(due, 0)
    while runs := [run for run, rows in waiting.items() if rows]:
        chosen = {run: waiting[run][: run.planned.pace.batch_size] for run in runs}
        sizes = [len(rows) for rows in chosen.values()]
        rows_B = [row for rows in chosen.values() for row in rows]
        stacked = batch(model, tokenizer, rows_B)
        for run, rows in chosen.items():
            run.job.take(rows, None)
        with SharedPass(model, [run.job for run in runs], sizes):
            losses_BK = row_losses(model, rows_B, stacked).double()
        real_BK = stacked.targets_BK != IGNORED
        for run, losses, real in zip(runs, torch.split(losses_BK, sizes), torch.split(real_BK, sizes), strict=True):
            totals[run] += float(losses.sum())
            counts[run] += int(real.sum())
            waiting[run] = waiting[run][len(chosen[run]) :]
    return [totals[run] / counts[run] for run in due]
