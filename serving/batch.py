"""The running batch: rows that advance together by one token a step, each under its own mixture.

    read(rows)    prompts, filled up on the left -> the model -> first tokens; keys and values join those that are there
    step()        the last token of every row -> the model -> one token more for each
    keep(rows)    the others leave, with their keys and values and the columns that only they filled

    columns       0 ........................... W-1
    row 0         .  .  .  p  p  p  p  t  t  t        mask_BW is 0 where a row has nothing (.), which attention gives
    row 1         p  p  p  p  p  p  p  p  t  t        weight 0, so that a row's answer is the one that it has alone

Why not the paged cache of transformers' own manager: that packs all rows into one, and mixtures follow rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraweave.composer.model.batches import pad_rows, takes, with_positions
from loraweave.composer.model.prefixes import cache_name, is_plain
from loraweave.errors import CompositionError
from loraweave.serving.experts import Experts
from loraweave.serving.row import Row


class Batch:
    """Rows of one model, their keys and values, and a mask of the columns that each has filled.

    Raises CompositionError for a model that is no decoder, takes no positions, or keeps more than plain keys and values:
    rows of different ages cannot share its cache.
    """

    def __init__(self, model: Any, tokenizer: Any, experts: Experts) -> None:
        if model.config.is_encoder_decoder or not takes(model, "position_ids"):
            raise CompositionError(
                f"cannot serve a {type(model).__name__}: rows of different ages need a decoder that takes position_ids"
            )
        self.rows: list[Row] = []
        self._model = model
        self._tokenizer = tokenizer
        self._experts = experts
        self._ends = end_tokens(model, tokenizer)
        self._keep_last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self._cache: Any = None
        self._mask_BW = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> None:
        """Reads rows from their beginning, chooses a token for each, and takes in those that go on."""
        ids_BT, mask_BT = pad_rows(self._tokenizer, [row.ids for row in rows])
        cache = self._advance(rows, with_positions(self._model, ids_BT, mask_BT), None)
        _require_plain(self._model, cache)
        mask_BT = mask_BT.to(self._device)
        if self.rows:
            _join(self._cache, cache)
            width = max(self._mask_BW.shape[1], mask_BT.shape[1])
            mask_BT = torch.cat([_filled_up(self._mask_BW, width), _filled_up(mask_BT, width)])
            cache = self._cache
        self.rows, self._cache, self._mask_BW = [*self.rows, *rows], cache, mask_BT
        self.keep([row for row in self.rows if not row.over])

    @torch.no_grad()
    def step(self) -> None:
        """One token more for every row; those that are over leave."""
        last_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows])
        mask_BW = pad(self._mask_BW, (0, 1), value=1)
        inputs = {"input_ids": last_B1, "attention_mask": mask_BW, "position_ids": mask_BW.sum(dim=1, keepdim=True) - 1}
        self._cache = self._advance(self.rows, inputs, self._cache)
        self._mask_BW = mask_BW
        self.keep([row for row in self.rows if not row.over])

    def keep(self, rows: Sequence[Row]) -> None:
        """Lets go of all other rows."""
        if len(rows) == len(self.rows):
            return
        kept = torch.tensor([place for place, row in enumerate(self.rows) if row in rows], device=self._device)
        self.rows = [row for row in self.rows if row in rows]
        if not self.rows:
            self._cache = None
            return
        mask_BW = self._mask_BW[kept]
        first = int(mask_BW.any(dim=0).int().argmax())
        self._mask_BW = mask_BW[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, first:], layer.values[kept, :, first:]

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _advance(self, rows: Sequence[Row], inputs: dict[str, Tensor], cache: Any) -> Any:
        """Runs the model and gives each row its logits; returns the cache."""
        given: dict[str, Any] = {name: value.to(self._device) for name, value in inputs.items()}
        if cache is not None:
            given[cache_name(self._model)] = cache
        with self._experts.activate([row.served for row in rows]):
            output = self._model(**given, use_cache=True, **self._keep_last)
        for row, logits_V in zip(rows, output.logits[:, -1], strict=True):
            row.take(logits_V, self._tokenizer, self._ends)
        return output[cache_name(self._model)]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a sequence: those of the model's generation settings, else the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if named is None else named
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _require_plain(model: Any, cache: Any) -> None:
    if not is_plain(cache):
        raise CompositionError(
            f"cannot serve a {type(model).__name__}: it keeps more than plain keys and values, or only those of a window"
        )


def _join(cache: Any, other: Any) -> None:
    """Puts the rows of another cache below those of this one, the narrower filled up on the left; all layers or none."""
    joined = []
    for mine, its in zip(cache.layers, other.layers, strict=True):
        width = max(mine.keys.shape[-2], its.keys.shape[-2])
        parts = ((mine.keys, its.keys), (mine.values, its.values))
        joined.append([torch.cat([_columns_filled_up(states_BHWD, width) for states_BHWD in part]) for part in parts])
    for layer, (keys_BHWD, values_BHWD) in zip(cache.layers, joined, strict=True):
        layer.keys, layer.values = keys_BHWD, values_BHWD


def _filled_up(mask_BW: Tensor, width: int) -> Tensor:
    return pad(mask_BW, (width - mask_BW.shape[1], 0))


def _columns_filled_up(states_BHWD: Tensor, width: int) -> Tensor:
    return pad(states_BHWD, (0, 0, width - states_BHWD.shape[2], 0))
