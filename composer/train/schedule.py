"""The schedule of a training: how many steps, how far each goes, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.common.descent import warmed_cosine
from loraweave.common.options import Count, Positive, Whole
from loraweave.common.randomness import seeded
from loraweave.composer.model.batches import IGNORED, EncodedRow, TargetBatch, batch, takes
from loraweave.composer.train.rows import TrainingRow
from loraweave.routers.tokens._call import prompted

Row = TypeVar("Row")

WARMUP_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """The pace of a job: `steps` of `batch_size` rows each, after `warmup` steps of a rising rate."""

    steps: Count = 60
    lr: Positive = 3e-3
    batch_size: Count = 8
    seed: int = 0
    warmup: Whole = WARMUP_STEPS

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        return warmed_cosine(self.lr, step, self.steps, min(self.warmup, self.steps // 2))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """Return the job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
        return Stream(rows, self.seed, job).at(step, self.batch_size)


@dataclass(frozen=True)
class Stream(Generic[Row]):
    """A stream of rows in epochs of shuffled order; `key` tells it from the others of one training."""

    rows: Sequence[Row]
    seed: int
    key: str

    def at(self, step: int, count: int) -> list[Row]:
        """Return the `count` rows of one step."""
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
    """The size of a job's part of a step: rows, which its own batches fill up to `width` tokens on the mean.

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
    """Return all jobs, shortest first, in the fewest groups, and among such groupings the one that computes fewest tokens.

    A group has at most `jobs_per_batch` jobs that fit together, and computes the width of its widest for all of them. Jobs
    next to each other in length are together; equal ones keep their order. Each job must fit alone.
    """
    names = in_order(sizes)
    # of the first n jobs: (groups, tokens, where the last group begins)
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for end in range(1, len(names) + 1):
        candidates = []
        for start in range(end - 1, max(0, end - jobs_per_batch) - 1, -1):
            members = [sizes[name] for name in names[start:end]]
            if len(members) > 1 and not fits(members):
                break
            tokens = sum(size.num_rows for size in members) * members[-1].width
            candidates.append((best[start][0] + 1, best[start][1] + tokens, start))
        best.append(min(candidates))
    cuts = [len(names)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][2])
    return [names[start:end] for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]


def in_order(sizes: Mapping[str, JobSize]) -> list[str]:
    """Return the names, narrow jobs first."""
    return sorted(sizes, key=lambda name: sizes[name].width)


def successor(waiting: Mapping[str, JobSize], running: Sequence[JobSize], fits: Fits) -> str | None:
    """Return the waiting job that fits beside the running ones and is nearest in length to them, if any."""
    mean = sum(size.width for size in running) / len(running)
    nearest = sorted(in_order(waiting), key=lambda name: abs(waiting[name].width - mean))
    return next((name for name in nearest if fits([*running, waiting[name]])), None)


# padding is masked, so any token will do where there is no tokenizer
NO_TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)


def streams(rows: Sequence[TrainingRow], experts: Sequence[str], seed: int, *, apart: bool) -> list[Stream[TrainingRow]]:
    """Return one stream of all rows; or one for each expert with rows, which does not depend on the other experts."""
    if not apart:
        return [Stream(rows, seed, "rows")]
    by_expert: dict[int, list[TrainingRow]] = {}
    for row in rows:
        by_expert.setdefault(row.expert, []).append(row)
    return [Stream(by_expert[place], seed, experts[place]) for place in sorted(by_expert)]


@dataclass(frozen=True)
class Pass:
    """A pass: rows that go through the model together.

    The step's loss is the sum over passes of sum over b and k of per_token_B * loss_BK, plus `share` times the pass's terms.
    `first` is the place of the first row among the step's, which are in the same order however many passes there are.
    """

    rows: Sequence[TrainingRow]
    per_token_B: Tensor
    share: float
    first: int


def passes(groups: Sequence[Sequence[TrainingRow]], num_passes: int) -> list[Pass]:
    """Return the passes of a step, rows of similar length together; a group counts as the mean over its target tokens."""
    weighted = []
    for group in groups:
        per_token = 1.0 / sum(row.num_targets for row in group)
        weighted += [(row, per_token) for row in group]
    # stable: equal lengths keep the order in which they were drawn
    weighted.sort(key=lambda pair: len(pair[0]))
    size = -(-len(weighted) // num_passes)
    starts = range(0, len(weighted), size)
    step_passes = []
    for start in starts:
        part = weighted[start : start + size]
        per_token_B = torch.tensor([share for _, share in part])
        step_passes.append(Pass([row for row, _ in part], per_token_B, 1 / len(starts), start))
    return step_passes


def pad_apart(given: TargetBatch) -> TargetBatch:
    """Return an encoder-decoder's batch, padded so that its decoder has another number of tokens than the encoder, above 1.

    The width of a layer's input then says whose tokens these are.
    """
    inputs, targets_BK = dict(given.inputs), given.targets_BK
    if targets_BK.shape[1] == 1:
        targets_BK = functional.pad(targets_BK, (0, 1), value=IGNORED)
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].repeat(1, 2)
    if targets_BK.shape[1] == inputs["input_ids"].shape[1]:
        inputs = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1),
            "attention_mask": functional.pad(inputs["attention_mask"], (0, 1)),
        }
    return TargetBatch(inputs, targets_BK)


def label_rows(base_model: Any, tokenizer: Any, rows: Sequence[TrainingRow], *, whole: bool) -> dict[str, Tensor]:
    """Return the rows as inputs of the model, with their `labels`, and in `task` each one's place among the tasks.

    The labels of a decoder are aligned with its last tokens, one before the longest target and those of it, where the model
    can leave out the logits of the others; with `whole`, with all tokens.
    """
    made = batch(base_model, tokenizer, rows)
    if base_model.config.is_encoder_decoder:
        made = pad_apart(made)
        labels = made.targets_BK
    else:
        length, width = made.inputs["input_ids"].shape[1], made.targets_BK.shape[1]
        before = 1 if takes(base_model, "logits_to_keep") and not whole else length - width
        labels = functional.pad(made.targets_BK, (before, 0), value=IGNORED)
    return {**made.inputs, "labels": labels, "task": torch.tensor([row.expert for row in rows], device=labels.device)}


def call_labelled(model: Any, inputs: Mapping[str, Tensor], *, two_sequences: bool) -> Any:
    """Return the model's output for inputs of `label_rows`, whose prompts are what stands before the first label."""
    inputs = dict(inputs)
    task_B, labels = inputs.pop("task"), inputs["labels"]
    # no row of a task is as if none were given
    task = None if bool((task_B < 0).all()) else task_B
    if two_sequences or labels.shape == inputs["input_ids"].shape:
        return model(**inputs, task=task, use_cache=False)
    mask_BT, width = inputs["attention_mask"], labels.shape[1]
    prompt_BT = torch.cat([mask_BT[:, :-width], mask_BT[:, -width:] * ((labels != IGNORED).cumsum(dim=1) == 0)], dim=1)
    length = mask_BT.shape[1]
    keep = torch.arange(length - width, length, device=labels.device)
    with prompted(inputs["input_ids"], prompt_BT):
        return model(**inputs, logits_to_keep=keep, task=task, use_cache=False)
