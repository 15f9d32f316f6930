"""The last real tokens of each row, wherever a batch has its padding."""

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


def with_row_positions(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with position ids from its mask where a decoder's padding comes first and none are given.

    Without them a model of absolute positions (GPT-2) would let the padding into what a row gets.
    """
    inputs = dict(batch)
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or "position_ids" in batch or not bool((mask[:, 0] == 0).any()):
        return inputs
    if model.can_generate() and not model.config.is_encoder_decoder and takes(model, "position_ids"):
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs
