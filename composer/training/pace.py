"""How a training steps: how often, how far, and on which rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.seeding import seeded

WARMUP_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """`steps` of `batch_size` rows each; `warmup` is a number of steps."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    warmup: int = WARMUP_STEPS

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """The job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
        chosen = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(place, len(rows))
            order = torch.randperm(len(rows), generator=seeded(self.seed, job, epoch))
            chosen.append(rows[int(order[offset])])
        return chosen
