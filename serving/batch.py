"""The running batch: rows that advance together by one token a step, each under its own mixture.

    read(rows)    what is new of the prompts, filled up on the left -> the model -> first tokens; keys and values join
                  those that are there
    step()        the last token of every row -> the model -> one token more for each
    keep(rows)    the others leave, with their keys and values and the columns that only they filled

A row has a line for each member of its composition, and all of them go on with its tokens:

    columns       0 ........................... W-1
    line 0        .  .  .  p  p  p  p  t  t  t        mask_BW is 0 where a line has nothing (.), which attention gives
    line 1        p  p  p  p  p  p  p  p  t  t        weight 0, so that an answer is the one that it is alone

Why not the paged cache of transformers' own manager: that packs all rows into one, and mixtures follow rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraweave.composer.model.batches import (
    cache_name,
    end_tokens,
    is_plain,
    last_logits,
    pad_rows,
    takes,
    with_positions,
)
from loraweave.errors import CompositionError
from loraweave.routers.tokens._call import prompted
from loraweave.serving.memory import Experts
from loraweave.serving.row import Row


class Prefixes:
    """The kept beginnings of prompts that were read. This one keeps nothing; an extension's does. One thread uses it."""

    kept_bytes = 0

    @property
    def oldest(self) -> float:
        """The time of the last use of what was used longest ago, by `time.monotonic`; infinity where nothing is kept."""
        return math.inf

    def drop_oldest(self) -> None:
        """Drop what was used longest ago."""

    def begin(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Any, Tensor]:
        """Return what the model is to read of these rows' lines, the cache before it or None, and the mask of both.

        Sets `num_kept` of rows that begin with what was read.
        """
        ids_BT, mask_BT = pad_rows(tokenizer, [line_ids for row in rows for line_ids in row.ids])
        return with_positions(model, ids_BT, mask_BT), None, mask_BT

    def compact(self, cache: Any, mask_BW: Tensor) -> Tensor:
        """Close the gaps in lines of a cache that `begin` gave and the model went on with; return the mask."""
        return mask_BW

    def remember(self, rows: Sequence[Row], ended: Sequence[Row], cache: Any) -> None:
        """Keep what the model made of the tokens of `ended`, which are among the batch's `rows`, failed ones excepted."""


class Batch:
    """The rows of one model that run together, their keys and values, and a mask of the columns that each has filled.

    A row has a line of its own for each of its members. Rows share a batch that are equal in `Row.batch`. What is read
    begins with what `prefixes` has of it. Raises CompositionError for a model that is not a decoder, takes no positions, or
    keeps more than plain keys and values: rows of different ages cannot share its cache.
    """

    def __init__(self, model: Any, tokenizer: Any, experts: Experts, prefixes: Prefixes) -> None:
        if model.config.is_encoder_decoder or not takes(model, "position_ids"):
            raise CompositionError(
                f"cannot serve a {type(model).__name__}: rows of different ages need a decoder that takes position_ids"
            )
        self.rows: list[Row] = []
        self._model = model
        self._tokenizer = tokenizer
        self._experts = experts
        self._prefixes = prefixes
        ends = end_tokens(model)
        self._ends = frozenset([tokenizer.eos_token_id] if ends is None else ends) - {None}
        self._keep_last = last_logits(model)
        self._cache_name = cache_name(model)
        self._cache: Any = None
        self._mask_BW = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> None:
        """Read rows from their beginning, choose a token for each, and take in those that go on."""
        inputs, before, mask_BT = self._prefixes.begin(self._model, self._tokenizer, rows)
        cache = self._advance(rows, inputs, before)
        if not is_plain(cache):
            raise CompositionError(
                f"cannot serve a {type(self._model).__name__}: it keeps more than plain keys and values, or only those of a "
                "window"
            )
        mask_BT = mask_BT.to(self._model.device)
        if before is not None:
            mask_BT = self._prefixes.compact(cache, mask_BT)
        if self.rows:
            _join(self._cache, cache)
            width = max(self._mask_BW.shape[1], mask_BT.shape[1])
            mask_BT = torch.cat([pad(mask_BW, (width - mask_BW.shape[1], 0)) for mask_BW in (self._mask_BW, mask_BT)])
            cache = self._cache
        self.rows, self._cache, self._mask_BW = [*self.rows, *rows], cache, mask_BT
        self._prefixes.remember(self.rows, rows, cache)
        self.keep([row for row in self.rows if not row.over])

    @torch.no_grad()
    def step(self) -> None:
        """Choose one more token for every row, and drop rows that are over."""
        last_B1 = torch.tensor([[row.tokens[-1]] for row in _by_line(self.rows)])
        mask_BW = pad(self._mask_BW, (0, 1), value=1)
        inputs = {"input_ids": last_B1, "attention_mask": mask_BW, "position_ids": mask_BW.sum(dim=1, keepdim=True) - 1}
        self._cache = self._advance(self.rows, inputs, self._cache)
        self._mask_BW = mask_BW
        self._prefixes.remember(self.rows, [row for row in self.rows if row.over], self._cache)
        self.keep([row for row in self.rows if not row.over])

    def keep(self, rows: Sequence[Row]) -> None:
        """Drop all other rows."""
        if len(rows) == len(self.rows):
            return
        places = [place for place, row in enumerate(_by_line(self.rows)) if row in rows]
        self.rows = [row for row in self.rows if row in rows]
        if not self.rows:
            self._cache = None
            return
        kept = torch.tensor(places, device=self._model.device)
        mask_BW = self._mask_BW[kept]
        first = int(mask_BW.any(dim=0).int().argmax())
        self._mask_BW = mask_BW[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, first:], layer.values[kept, :, first:]

    def _advance(self, rows: Sequence[Row], inputs: dict[str, Tensor], cache: Any) -> Any:
        """Run the model and give each row its logits; return the cache."""
        arguments: dict[str, Any] = {name: value.to(self._model.device) for name, value in inputs.items()}
        if cache is not None:
            arguments[self._cache_name] = cache
        with self._experts.activate([row.served for row in rows]), self._prompted(rows):
            output = self._model(**arguments, use_cache=True, **self._keep_last)
        first = 0
        for row in rows:
            row.take(output.logits[first : first + len(row.prompts), -1], self._tokenizer, self._ends)
            first += len(row.prompts)
        return output[self._cache_name]

    def _prompted(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Tell routers the rows' prompts inside the context."""
        if rows[0].served.router is None and not any(m.is_activated for row in rows for m in row.served.members):
            return nullcontext()
        return prompted(*pad_rows(self._tokenizer, [prompt for row in rows for prompt in row.prompts]))


def _by_line(rows: Sequence[Row]) -> list[Row]:
    """Return the row of each line."""
    return [row for row in rows for _ in row.prompts]


def _join(cache: Any, other: Any) -> None:
    """Append another cache's rows to this one's, padding the narrower on the left; all layers change, or none."""
    joined = []
    for mine, its in zip(cache.layers, other.layers, strict=True):
        width = max(mine.keys.shape[-2], its.keys.shape[-2])
        parts = ((mine.keys, its.keys), (mine.values, its.values))
        joined.append([torch.cat([pad(states, (0, 0, width - states.shape[2], 0)) for states in part]) for part in parts])
    for layer, (keys_BHWD, values_BHWD) in zip(cache.layers, joined, strict=True):
        layer.keys, layer.values = keys_BHWD, values_BHWD
