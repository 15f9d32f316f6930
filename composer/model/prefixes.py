"""The beginning that all rows of a batch share, read once: demonstrations in front of every prompt of a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from loraweave.composer.model.batches import last_logits, pad_rows, takes, with_positions

# a shorter prefix costs a pass of its own and saves little
MIN_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The keys and values of what the rows of each group begin with: ids_MP and mask_MP, one row of each of M groups."""

    ids_MP: Tensor
    mask_MP: Tensor
    lengths: tuple[int, ...]
    cache: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any, groups: Sequence[Sequence[Sequence[int]]]) -> Prefixes | None:
        """Read what the rows of each group have in common, with one token left to each row.

        Returns None where sharing does not pay or cannot be exact: for encoder-decoders, for models without positions, and
        for caches other than plain keys and values.
        """
        if any(len(rows) < 2 for rows in groups) or model.config.is_encoder_decoder or not takes(model, "position_ids"):
            return None
        common = [_beginning(rows) for rows in groups]
        lengths = tuple(map(len, common))
        if max(lengths) < MIN_TOKENS or not min(lengths):
            return None
        device = next(model.parameters()).device
        ids_MP, mask_MP = pad_rows(tokenizer, common)
        inputs = {name: value.to(device) for name, value in with_positions(model, ids_MP, mask_MP).items()}
        cache = model(**inputs, use_cache=True, **last_logits(model))[cache_name(model)]
        return cls(ids_MP, mask_MP, lengths, cache) if is_plain(cache) else None

    def before(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Any]:
        """Return (inputs, cache) for rows that are as many of each group, one group after the other.

        The inputs are the whole rows, padded before the prefix and between it and what follows; the cache has its rows.
        """
        device, group_size = next(model.parameters()).device, len(rows) // len(self.lengths)
        rest = [row[self.lengths[number // group_size] :] for number, row in enumerate(rows)]
        rest_BT, mask_BT = pad_rows(tokenizer, rest)
        ids_BT = torch.cat([self.ids_MP.repeat_interleave(group_size, dim=0), rest_BT], dim=1)
        mask_BT = torch.cat([self.mask_MP.repeat_interleave(group_size, dim=0), mask_BT], dim=1)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(group_size)
        inputs = with_positions(model, ids_BT, mask_BT)
        return {name: value.to(device) for name, value in inputs.items()}, cache

    def after(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return arguments for a call of the model that reads only what follows the prefixes of these rows."""
        inputs, cache = self.before(model, tokenizer, rows)
        return {**following(inputs, self.ids_MP.shape[1]), cache_name(model): cache}


def _beginning(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the tokens that all rows begin with, without the last one of the shortest row."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*(row[:-1] for row in rows), strict=False))
    return tuple(column[0] for column in columns)


def is_plain(cache: Any) -> bool:
    """Return whether a cache holds keys and values of whole rows, and nothing else: no window, state or quantised ones."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def following(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return a decoder's inputs without the first `length` tokens; the mask still has them."""
    return {name: value if name == "attention_mask" else value[:, length:] for name, value in inputs.items()}


def cache_name(model: Any) -> str:
    """Return the name of the cache's argument: transformers 5.24 renamed it; the floor 5.3 has the old name."""
    return "cache" if takes(model, "cache") else "past_key_values"
