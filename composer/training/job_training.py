"""The steps of a training: AdamW on the factors of some jobs, whatever their loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from loraweave.composer.batches import IGNORED, EncodedRow, batch, token_losses
from loraweave.composer.training.fused_jobs import FusedJobs
from loraweave.composer.training.training_recipe import Recipe
from loraweave.errors import TrainingError
from loraweave.retrieval.training_state import TrainingState, load_state, save_state

GRADIENT_LIMIT = 1.0
CHECKPOINT_STEPS = 20

# loss_J of one step, by its number
Losses = Callable[[int], Tensor]


@dataclass(frozen=True)
class JobTraining:
    """Where jobs are trained and shown."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    bar: Progress

    def run(
        self,
        jobs: FusedJobs,
        losses: Losses,
        *,
        after_step: Callable[[int], None] | None = None,
        kept: tuple[Path, str] | None = None,
    ) -> None:
        """Takes the recipe's steps down the gradient of `losses`, each job's clipped to norm 1.

        `kept` is a checkpoint folder and a key: the state is kept there, and a state that is there is gone on from.
        Raises TrainingError for a loss that is not finite.
        """
        recipe, start = self.recipe, 0
        optimizer = torch.optim.AdamW(jobs.parameters(), lr=recipe.lr, weight_decay=0.0)
        if kept is not None and (state := load_state(*kept)):
            start = state.restore(jobs.parameters(), optimizer)
        shown = self.bar.add_task(", ".join(jobs.jobs), total=recipe.steps, completed=start, loss="")
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            loss_J = losses(step)
            _require_finite(loss_J, jobs, step)
            optimizer.zero_grad()
            loss_J.sum().backward()  # type: ignore[no-untyped-call]
            jobs.clip(GRADIENT_LIMIT)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            self.bar.update(shown, advance=1, loss=f"loss {float(loss_J.detach().mean()):.3f}")
            if kept is not None and (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < recipe.steps:
                save_state(*kept, TrainingState.of(step + 1, jobs.parameters(), optimizer))

    def plain(self, jobs: FusedJobs, rows: Mapping[str, Sequence[EncodedRow]]) -> Losses:
        """Each job's loss on its own rows."""

        def losses(step: int) -> Tensor:
            chosen = [row for job in jobs.jobs for row in self.recipe.rows(rows[job], job, step)]
            with jobs:
                return job_losses(self.model, self.tokenizer, chosen, len(jobs.jobs))

        return losses


def job_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], num_jobs: int) -> Tensor:
    """loss_J: the mean over the target tokens of each job's rows."""
    stacked = batch(model, tokenizer, rows)
    losses_JN = token_losses(model, stacked).view(num_jobs, -1)
    counts_J = (stacked.targets_BK != IGNORED).view(num_jobs, -1).sum(dim=1)
    return losses_JN.sum(dim=1) / counts_J


def _require_finite(loss_J: Tensor, jobs: FusedJobs, step: int) -> None:
    if not bool(torch.isfinite(loss_J).all()):
        index = int((~torch.isfinite(loss_J)).nonzero()[0])
        raise TrainingError(
            f"the loss of job {jobs.jobs[index]!r} is {float(loss_J.detach()[index])} at step {step + 1}; "
            "lower lr, or look for damaged examples. Adapters that were finished before are kept"
        )
