"""Whether a model gives rows that are run as one tree what it gives each alone: first by its structure, then by trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loraweave.composer.batches import EncodedRow, batch, logits_at, mean_losses, takes
from loraweave.composer.evaluation.token_tree import token_tree, tree_inputs
from loraweave.composer.untouched import untouched

# attention over less than the whole row, whose masks are the model's own affair
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")
MASKED = ("eager", "sdpa")
NUM_TRIED = 4


def runs_trees(model: nn.Module, tokenizer: Any, rows: Sequence[EncodedRow]) -> bool:
    """Whether these rows have the same losses as a tree, to rounding, in the model as it is; some of them are tried.

    False, without a trial, for encoder-decoders, for models that take no positions (recurrent ones, ALiBi), for attention
    that takes no mask of four axes, and for windows that are shorter than the longest row.
    """
    if not _could(model, rows):
        return False
    tried = _some(rows)
    with untouched(model), torch.no_grad():
        apart_B = mean_losses(model, batch(model, tokenizer, tried)).double()
        try:
            together_B = _as_tree(model, tried)
        # whatever a model raises for a mask it did not expect
        except Exception:
            return False
    tolerance = 1e-4 if torch.finfo(_dtype(model)).bits >= 32 else 5e-2
    return bool(((together_B - apart_B).abs() <= tolerance * apart_B.abs().clamp(min=1.0)).all())


def _could(model: Any, rows: Sequence[EncodedRow]) -> bool:
    config = model.config
    if config.is_encoder_decoder or not takes(model, "position_ids") or not all(row.prompt for row in rows):
        return False
    text = config.get_text_config()
    longest = max(map(len, rows))
    windows = [getattr(text, name, None) for name in WINDOWS]
    if any(isinstance(window, int) and window < longest for window in windows):
        return False
    return getattr(config, "_attn_implementation", None) in MASKED


def _some(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Short and long ones, that differ."""
    distinct = sorted(dict.fromkeys(rows), key=len)
    step = max(1, (len(distinct) - 1) / (NUM_TRIED - 1))
    return [distinct[int(number * step)] for number in range(min(NUM_TRIED, len(distinct)))]


def _as_tree(model: Any, rows: Sequence[EncodedRow]) -> torch.Tensor:
    tree = token_tree(rows)
    device = next(model.parameters()).device
    inputs = tree_inputs([tree], 0, _dtype(model), device)
    logits_PV = logits_at(model, inputs, len(tree) - tree.num_predictors, len(tree))[0]
    logs_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32)).log_softmax(dim=1)
    slot_RK, target_RK = tree.slot_RK.to(device), tree.target_RK.to(device)
    real_RK = target_RK >= 0
    losses_RK = -logs_PV[slot_RK, target_RK.clamp(min=0)].masked_fill(~real_RK, 0.0)
    return (losses_RK.sum(dim=1) / real_RK.sum(dim=1)).double()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
