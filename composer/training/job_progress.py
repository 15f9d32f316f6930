"""One job on its way: its optimiser, its step, and the best that it has been."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.best import Best, put
from loraweave.composer.training.descent import Descent
from loraweave.composer.training.flat_parameters import FlatParameters
from loraweave.composer.training.planned_job import PlannedJob
from loraweave.composer.training.training_report import JobReport
from loraweave.retrieval.training_state import TrainingState

ALL_STEPS = "all steps"


class JobProgress:
    """A job that runs. Its state depends on its own losses alone, so that nothing changes when another leaves its batch."""

    def __init__(self, planned: PlannedJob) -> None:
        self.planned = planned
        self.job = planned.make()
        self.step = 0
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.num_tokens = 0
        self._best = Best()
        self._flat = FlatParameters(self.job.parameters())
        # on a GPU the fused one wants its count of steps there
        is_on_cpu = all(vector.device.type == "cpu" for vector in self._flat.vectors)
        self._descent = Descent(self._flat.vectors, planned.pace, fused=is_on_cpu)

    def next_rows(self) -> list[EncodedRow]:
        """Those of the step to be taken."""
        return self.planned.pace.rows(self.planned.rows, self.planned.name, self.step)

    def take_step(self, loss: float, num_tokens: int) -> None:
        """Down the gradient that the parameters have, clipped to norm 1, and forgets it."""
        self._descent.step(self.step)
        self._flat.zero_grad()
        self.step += 1
        self.losses.append(loss)
        self.num_tokens += num_tokens

    @property
    def due(self) -> bool:
        """Whether the held-out rows are to be evaluated now."""
        plan = self.planned.held_out
        if plan is None or (self.held_out and self.held_out[-1][0] == self.step):
            return False
        return self.step % plan.every == 0 or self.step == self.planned.pace.steps

    def evaluated(self, loss: float) -> None:
        """Takes note of the held-out loss at this step, and of the parameters where none was lower after an earlier one."""
        self.held_out.append((self.step, loss))
        if self.step:
            self._best.judge(loss, self._flat.vectors)

    @property
    def stopped(self) -> str | None:
        """Why it ends here; None while it goes on."""
        patience = None if self.planned.held_out is None else self.planned.held_out.patience
        if patience is not None and self._best.waited >= patience:
            return f"no lower held-out loss in {patience} evaluations"
        return ALL_STEPS if self.step >= self.planned.pace.steps else None

    def finish(self) -> JobReport:
        """What it did; the job has the best of its evaluated parameters from here on."""
        best_step = self.step
        if self._best.values:
            put(self._best.values, self._flat.vectors)
            best_step = next(step for step, loss in self.held_out if step and loss == self._best.loss)
        return JobReport(
            steps=self.step,
            best_step=best_step,
            stopped=self.stopped or "",
            num_tokens=self.num_tokens,
            losses=tuple(self.losses),
            held_out=tuple(self.held_out),
        )

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on from here to the same bits."""
        # before its first step an optimiser has no moments
        begun = TrainingState.of(self.step, self._flat.vectors, self._descent.optimizer).tensors if self.step else {}
        best = {f"best.{index}": tensor for index, tensor in enumerate(self._best.values)}
        points = torch.tensor([list(point) for point in self.held_out], dtype=torch.float64).view(-1, 2)
        losses = torch.tensor(self.losses, dtype=torch.float64)
        counts = {"step": torch.tensor([self.step]), "num_tokens": torch.tensor([self.num_tokens])}
        return {**begun, **best, **counts, "held_out": points, "losses": losses}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` has given."""
        self.step, self.num_tokens = int(state["step"]), int(state["num_tokens"])
        self.losses = state["losses"].tolist()
        self.held_out = [(int(step), loss) for step, loss in state["held_out"].tolist()]
        vectors = self._flat.vectors
        if self.step:
            TrainingState(self.step, dict(state)).restore(vectors, self._descent.optimizer)
        values = [state[f"best.{index}"].to(vector.device) for index, vector in enumerate(vectors) if "best.0" in state]
        self._best = Best.again([loss for step, loss in self.held_out if step], values)
