"""How a training steps: how often, how far, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from loraweave.common.descent import warmed_cosine
from loraweave.common.options import Count, Positive, Whole
from loraweave.common.randomness import seeded
from loraweave.composer.model.batches import EncodedRow

Row = TypeVar("Row")

WARMUP_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """`steps` of `batch_size` rows each; `warmup` is a number of steps."""

    steps: Count = 60
    lr: Positive = 3e-3
    batch_size: Count = 8
    seed: int = 0
    warmup: Whole = WARMUP_STEPS

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        return warmed_cosine(self.lr, step, self.steps, min(self.warmup, self.steps // 2))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """The job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
        return Stream(rows, self.seed, job).at(step, self.batch_size)


@dataclass(frozen=True)
class Stream(Generic[Row]):
    """Rows in epochs of shuffled order; `key` tells a stream from the others of one training."""

    rows: Sequence[Row]
    seed: int
    key: str

    def at(self, step: int, count: int) -> list[Row]:
        """The `count` rows of one step."""
        chosen: list[Row] = []
        orders: dict[int, list[int]] = {}
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, len(self.rows))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(self.rows), generator=seeded(self.seed, self.key, epoch)).tolist()
            chosen.append(self.rows[orders[epoch][offset]])
        return chosen


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
