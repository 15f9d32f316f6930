"""How a training steps: how often, how far, and on which rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraweave.composer.model.batches import EncodedRow

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


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU whose numbers are a function of the parts' representations alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


Fits = Callable[[Sequence["JobSize"]], bool]


@dataclass(frozen=True)
class JobSize:
    """What a job brings to a step: rows, which its own batches fill up to `width` tokens on the mean.

    `longest` and `longest_target` are tokens of its longest rows, `num_parameters` what it trains, `num_copies` the tensors
    of that size: values, gradients, AdamW's two moments, and the best values so far where they are kept.
    """

    num_rows: int
    width: float
    longest: int
    longest_target: int
    num_parameters: int
    num_copies: int = 4


def groups(sizes: Mapping[str, JobSize], jobs_per_batch: int, fits: Fits) -> list[list[str]]:
    """All jobs, shortest first, in as few groups as can be, and of such groups those that compute the fewest tokens.

    A group has at most `jobs_per_batch` jobs that fit together, and computes the width of its widest for all of them. Jobs
    next to each other in length are together; equal ones keep their order. Each job must fit alone.
    """
    names = in_order(sizes)
    # of the first n jobs: (groups, tokens, where the last group begins)
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for end in range(1, len(names) + 1):
        found = []
        for start in range(end - 1, max(0, end - jobs_per_batch) - 1, -1):
            members = [sizes[name] for name in names[start:end]]
            if len(members) > 1 and not fits(members):
                break
            tokens = sum(size.num_rows for size in members) * members[-1].width
            found.append((best[start][0] + 1, best[start][1] + tokens, start))
        best.append(min(found))
    cuts = [len(names)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][2])
    return [names[start:end] for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]


def in_order(sizes: Mapping[str, JobSize]) -> list[str]:
    """The names, narrow jobs first."""
    return sorted(sizes, key=lambda name: sizes[name].width)


def successor(waiting: Mapping[str, JobSize], running: Sequence[JobSize], fits: Fits) -> str | None:
    """The waiting job whose length is nearest to those that run, if one fits beside them."""
    mean = sum(size.width for size in running) / len(running)
    nearest = sorted(in_order(waiting), key=lambda name: abs(waiting[name].width - mean))
    return next((name for name in nearest if fits([*running, waiting[name]])), None)
