"""What all rows of a batch begin with, read once: demonstrations in front of every prompt of a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from loraweave.composer.model.batches import pad_rows, takes, with_positions

# a shorter prefix costs a pass of its own and saves little
MIN_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values of the first `length` tokens of every row, of one row."""

    ids: tuple[int, ...]
    cache: Any

    @classmethod
    def of(cls, model: Any, rows: Sequence[Sequence[int]]) -> Prefix | None:
        """What the rows have in common, with one token left to each; None where sharing does not pay or cannot be exact.

        It cannot be for encoder-decoders, for models without positions, and for caches other than plain keys and values.
        """
        if len(rows) < 2 or model.config.is_encoder_decoder or not takes(model, "position_ids"):
            return None
        columns = takewhile(lambda column: len(set(column)) == 1, zip(*(row[:-1] for row in rows), strict=False))
        ids = tuple(column[0] for column in columns)
        if len(ids) < MIN_TOKENS:
            return None
        device = next(model.parameters()).device
        keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        cache = model(input_ids=torch.tensor([ids], device=device), use_cache=True, **keep)[cache_name(model)]
        plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        return cls(ids, cache) if plain else None

    def __len__(self) -> int:
        return len(self.ids)

    def before(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Any]:
        """(inputs, cache): the whole rows, padded between the prefix and what follows it, and the cache for as many rows."""
        device = next(model.parameters()).device
        rest_BT, mask_BT = pad_rows(tokenizer, [row[len(self) :] for row in rows])
        ids_BT = torch.cat([torch.tensor(self.ids).expand(len(rows), -1), rest_BT], dim=1)
        mask_BT = torch.cat([torch.ones(len(rows), len(self), dtype=mask_BT.dtype), mask_BT], dim=1)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(rows))
        inputs = with_positions(model, ids_BT, mask_BT)
        return {name: value.to(device) for name, value in inputs.items()}, cache

    def after(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Arguments of a call of the model that reads only what follows the prefix."""
        inputs, cache = self.before(model, tokenizer, rows)
        return {**following(inputs, len(self)), cache_name(model): cache}


def following(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """A decoder's inputs without the first tokens; the mask still has them."""
    return {name: value if name == "attention_mask" else value[:, length:] for name, value in inputs.items()}


def cache_name(model: Any) -> str:
    """transformers 5.24 renamed the argument; the floor 5.3 has the old name."""
    return "cache" if takes(model, "cache") else "past_key_values"
