"""What goes to the model from a batch padded on either side: positions, where rows end, and no cache that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.batches import takes
from loraweave.errors import CompositionError


def last_positions(batch: Mapping[str, Any], count: int, length: int, mask_name: str = "attention_mask") -> Tensor:
    """place_BK: where the last `count` real tokens of each row of `length` are; all are real where no mask is given.

    Raises CompositionError for a row of fewer tokens, and for a mask that does not say which tokens are padding.
    """
    mask = batch.get(mask_name)
    if mask is None:
        end_B = torch.tensor([length - 1])
        num_tokens = length
    else:
        if mask.dim() != 2:
            raise CompositionError(f"{mask_name} has {mask.dim()} axes; give one of two, which says what is padding")
        end_B = length - 1 - mask.flip(1).ne(0).int().argmax(dim=1)
        num_tokens = int(mask.ne(0).sum(dim=1).min())
    if count > num_tokens:
        raise CompositionError(f"{count} positions were asked for, but the shortest row has {num_tokens} tokens")
    return end_B[:, None] + torch.arange(1 - count, 1, device=end_B.device)


def without_left_padding(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch such that padding before a row's tokens does not count as positions, where it has such padding.

    A decoder gets position ids from the mask, unless some are given; for any other model the padding goes to the end.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool((mask[:, 0] == 0).any()):
        return dict(batch)
    if "position_ids" in batch:
        return dict(batch)
    if model.can_generate() and not model.config.is_encoder_decoder and takes(model, "position_ids"):
        return {**batch, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    return right_aligned(batch)


def right_aligned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with all padding after a row's tokens: every tensor of the mask's shape moves with it."""
    inputs = dict(batch)
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return inputs
    order_BT = mask.eq(0).int().argsort(dim=1, stable=True)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape == mask.shape and not key.startswith("decoder"):
            inputs[key] = value.gather(1, order_BT)
    return inputs


def without_cache(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call after which no other follows: keys and values are kept only where the batch asks for them."""
    return {"use_cache": False, **inputs} if takes(model, "use_cache") else dict(inputs)
