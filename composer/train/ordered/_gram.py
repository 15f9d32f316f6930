"""What the target layers see on the examples of a task."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.model.batches import batch, target_logits
from loraweave.composer.train.ordered._course import Course, Layers

ROWS_AT_ONCE = 8


@torch.no_grad()
def input_grams(course: Course, name: str, update: Layers, max_examples: int) -> dict[str, Tensor]:
    """gram_II = X^T X / n of each target layer, float64 on the CPU, over the n real tokens of the task's first examples.

    `update` is in the model. An encoder-decoder runs its examples one by one, without padding.
    """
    model, tokenizer = course.training.model, course.training.tokenizer
    alone = bool(model.config.is_encoder_decoder)
    rows, size = course.rows[name][:max_examples], 1 if alone else ROWS_AT_ONCE
    grams = {layer: torch.zeros(inputs, inputs, dtype=torch.float64) for layer, (_, inputs) in course.layers.items()}
    counts = dict.fromkeys(grams, 0)
    mask_BT = torch.zeros(0)

    def see(layer: str, x: Tensor) -> None:
        x_NI = (x.flatten(0, -2) if alone else x[mask_BT]).double().cpu()
        grams[layer].addmm_(x_NI.T, x_NI)
        counts[layer] += len(x_NI)

    with ExitStack() as stack:
        stack.enter_context(course.frozen(update))
        for layer in grams:
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(_seer(layer, see)).remove)
        for first in range(0, len(rows), size):
            stacked = batch(model, tokenizer, rows[first : first + size])
            mask_BT = stacked.inputs["attention_mask"].bool()
            target_logits(model, stacked)
    return {layer: gram_II / max(1, counts[layer]) for layer, gram_II in grams.items()}


def _seer(layer: str, see: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])

    return hook
