"""The losses of rows that jobs are not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraweave.composer.batches import IGNORED, EncodedRow, batch, token_losses
from loraweave.composer.training.fused_pass import FusedPass
from loraweave.composer.training.job_progress import JobProgress


@torch.no_grad()
def held_out_losses(model: Any, tokenizer: Any, due: Sequence[JobProgress]) -> list[float]:
    """The mean over all target tokens of each job's held-out rows, as many rows at a time as in its steps."""
    waiting = {run: list(run.planned.held_out.rows) for run in due if run.planned.held_out is not None}
    totals, counts = dict.fromkeys(due, 0.0), dict.fromkeys(due, 0)
    while runs := [run for run, rows in waiting.items() if rows]:
        chosen = {run: waiting[run][: run.planned.pace.batch_size] for run in runs}
        for run, (total, count) in _summed(model, tokenizer, chosen).items():
            totals[run] += total
            counts[run] += count
            waiting[run] = waiting[run][len(chosen[run]) :]
    return [totals[run] / counts[run] for run in due]


def _summed(
    model: Any, tokenizer: Any, chosen: Mapping[JobProgress, Sequence[EncodedRow]]
) -> dict[JobProgress, tuple[float, int]]:
    """The sum of the losses, and the number, of each job's target tokens."""
    sizes = [len(rows) for rows in chosen.values()]
    stacked = batch(model, tokenizer, [row for rows in chosen.values() for row in rows])
    for run, rows in chosen.items():
        run.job.take(rows, None)
    with FusedPass(model, [run.job for run in chosen], sizes):
        losses_BK = token_losses(model, stacked)
    real_BK = stacked.targets_BK != IGNORED
    parts = zip(torch.split(losses_BK.double(), sizes), torch.split(real_BK, sizes), strict=True)
    return {run: (float(own.sum()), int(real.sum())) for run, (own, real) in zip(chosen, parts, strict=True)}
