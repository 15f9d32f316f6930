"""Rows of a training as calls of a model with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import IGNORED, takes
from loraweave.composer.router_training.passes import target_batch, told_apart
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.routers.routing.prompts import prompted


def labelled(base_model: Any, tokenizer: Any, rows: Sequence[TrainingRow], *, whole: bool) -> dict[str, Tensor]:
    """The rows as inputs of the model, with their `labels`, and in `task` each one's place among the tasks.

    The labels of a decoder are aligned with its last tokens, one before the longest target and those of it, where the model
    can leave out the logits of the others; with `whole`, with all tokens.
    """
    made = target_batch(base_model, tokenizer, rows)
    if base_model.config.is_encoder_decoder:
        made = told_apart(made)
        labels = made.targets_BK
    else:
        length, width = made.inputs["input_ids"].shape[1], made.targets_BK.shape[1]
        before = 1 if takes(base_model, "logits_to_keep") and not whole else length - width
        labels = functional.pad(made.targets_BK, (before, 0), value=IGNORED)
    return {**made.inputs, "labels": labels, "task": torch.tensor([row.expert for row in rows], device=labels.device)}


def called(model: Any, inputs: Mapping[str, Tensor], *, two_sequences: bool) -> Any:
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
