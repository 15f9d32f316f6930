"""The steps of a training: AdamW on the factors of some jobs, whatever their loss is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from loraweave.composer.batches import IGNORED, EncodedRow, batch, token_losses
from loraweave.composer.router_training.passes import told_apart
from loraweave.composer.training.descent import Descent
from loraweave.composer.training.fused_jobs import FusedJobs
from loraweave.composer.training.training_recipe import Recipe
from loraweave.errors import TrainingError

# loss_J of one step, by its number
Losses = Callable[[int], Tensor]


@dataclass(frozen=True)
class JobTraining:
    """Where jobs are trained and shown."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    bar: Progress

    def run(self, jobs: FusedJobs, losses: Losses, *, after_step: Callable[[int], None] | None = None) -> None:
        """Takes the recipe's steps down the gradient of `losses`, each job's clipped to norm 1.

        Raises TrainingError for a loss that is not finite.
        """
        recipe = self.recipe
        descents = [Descent(job.parameters(), recipe.pace) for job in jobs.members]
        shown = self.bar.add_task(", ".join(jobs.jobs), total=recipe.steps, loss="")
        for step in range(recipe.steps):
            loss_J = losses(step)
            backward(loss_J, dict.fromkeys(jobs.jobs, step))
            for descent in descents:
                descent.step(step)
                descent.optimizer.zero_grad()
            if after_step is not None:
                after_step(step)
            self.bar.update(shown, advance=1, loss=f"loss {float(loss_J.detach().mean()):.3f}")


def job_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], num_jobs: int) -> Tensor:
    """loss_J: the mean over the target tokens of each job's rows, of which all have as many."""
    return range_losses(model, tokenizer, rows, [len(rows) // num_jobs] * num_jobs)


def range_losses(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], row_counts: Sequence[int]) -> Tensor:
    """loss_J: the mean over the target tokens of each job's rows, of which it has as many as its count."""
    stacked = batch(model, tokenizer, rows)
    if model.config.is_encoder_decoder:
        # what gates are asked for counts the tokens of either
        stacked = told_apart(stacked)
    sums_B = token_losses(model, stacked).sum(dim=1)
    counts_B = (stacked.targets_BK != IGNORED).sum(dim=1)
    sizes = list(row_counts)
    pairs = zip(torch.split(sums_B, sizes), torch.split(counts_B, sizes), strict=True)
    return torch.stack([own.sum() / counts.sum() for own, counts in pairs])


def backward(loss_J: Tensor, steps: Mapping[str, int]) -> list[float]:
    """The losses as numbers, after their gradients were added to the parameters'. `steps` has each job's step, from 0.

    Raises TrainingError before for a loss that is not finite.
    """
    losses = loss_J.tolist()
    for (name, step), loss in zip(steps.items(), losses, strict=True):
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of job {name!r} is {loss} at step {step + 1}; lower lr, or look for damaged examples. "
                "Adapters that were finished before are kept"
            )
    loss_J.sum().backward()  # type: ignore[no-untyped-call]
    return losses
