"""Which rows a step has, a function of the seed and the step alone, and what each pass of them counts in the step's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.model.batches import IGNORED, TargetBatch, batch, takes
from loraweave.composer.train.rows import TrainingRow
from loraweave.composer.train.schedule import Stream
from loraweave.routers.tokens._call import prompted

# padding is masked, so any token will do where there is no tokenizer
NO_TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)


def streams(rows: Sequence[TrainingRow], experts: Sequence[str], seed: int, *, apart: bool) -> list[Stream[TrainingRow]]:
    """One stream of all rows; or one for each expert with rows, which does not depend on what other experts there are."""
    if not apart:
        return [Stream(rows, seed, "rows")]
    by_expert: dict[int, list[TrainingRow]] = {}
    for row in rows:
        by_expert.setdefault(row.expert, []).append(row)
    return [Stream(by_expert[place], seed, experts[place]) for place in sorted(by_expert)]


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together.

    The step's loss is the sum over passes of sum over b and k of per_token_B * loss_BK, plus `share` times the pass's terms.
    `first` is the place of the first row among the step's, which are in the same order however many passes there are.
    """

    rows: Sequence[TrainingRow]
    per_token_B: Tensor
    share: float
    first: int


def passes(groups: Sequence[Sequence[TrainingRow]], num_passes: int) -> list[Pass]:
    """The rows of a step, those of similar length together; each group counts with the mean over its target tokens."""
    weighted = []
    for group in groups:
        per_token = 1.0 / sum(row.num_targets for row in group)
        weighted += [(row, per_token) for row in group]
    # stable: equal lengths keep the order in which they were drawn
    weighted.sort(key=lambda pair: len(pair[0]))
    size = -(-len(weighted) // num_passes)
    starts = range(0, len(weighted), size)
    found = []
    for start in starts:
        part = weighted[start : start + size]
        per_token_B = torch.tensor([share for _, share in part])
        found.append(Pass([row for row, _ in part], per_token_B, 1 / len(starts), start))
    return found


def target_batch(model: Any, tokenizer: Any, rows: Sequence[TrainingRow]) -> TargetBatch:
    """The rows as one batch on the model's device, with loss only where their labels ask for it."""
    return batch(model, NO_TOKENIZER if tokenizer is None else tokenizer, rows)


def pad_apart(given: TargetBatch) -> TargetBatch:
    """The batch of an encoder-decoder with more padding where it takes some to give the decoder another number of tokens
    than the encoder, and more than 1: the width of what a layer sees then says whose tokens these are."""
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
    """The rows as inputs of the model, with their `labels`, and in `task` each one's place among the tasks.

    The labels of a decoder are aligned with its last tokens, one before the longest target and those of it, where the model
    can leave out the logits of the others; with `whole`, with all tokens.
    """
    made = target_batch(base_model, tokenizer, rows)
    if base_model.config.is_encoder_decoder:
        made = pad_apart(made)
        labels = made.targets_BK
    else:
        length, width = made.inputs["input_ids"].shape[1], made.targets_BK.shape[1]
        before = 1 if takes(base_model, "logits_to_keep") and not whole else length - width
        labels = functional.pad(made.targets_BK, (before, 0), value=IGNORED)
    return {**made.inputs, "labels": labels, "task": torch.tensor([row.expert for row in rows], device=labels.device)}


def call_labelled(model: Any, inputs: Mapping[str, Tensor], *, two_sequences: bool) -> Any:
    """The model's output for `labelled` inputs, whose prompts are what stands before the first label."""
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
