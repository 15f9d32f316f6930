"""What the rows of a call of the model say, as token ids, and how much of it decides on the weights of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import ScopeError
from loraweave.routers.routing.prompts import current_prompts


def given_tokens(router: str, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT) of the tokens that the call was given; the mask is also of those before, where there is a cache.

    Raises ScopeError for a call by embeddings, and for a mask that does not say which tokens are real.
    """
    ids_BT, mask_BT = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids_BT, Tensor):
        raise ScopeError(
            f"router {router!r} chooses by the text of a row, and this call of the model has no input_ids: call it with "
            "token ids, or generate() from them"
        )
    if mask_BT is None:
        return ids_BT, torch.ones_like(ids_BT)
    if not isinstance(mask_BT, Tensor) or mask_BT.ndim != 2:
        raise ScopeError(
            f"router {router!r} chooses by the text of a row, and an attention mask of another form than (rows, tokens) "
            "does not say which tokens that is: give such a mask, or none"
        )
    return ids_BT, mask_BT


def require_whole(router: str, arguments: Mapping[str, Any]) -> None:
    """Raises ScopeError for a call that goes on under a cache, whose earlier tokens are not known here."""
    cache = arguments.get("past_key_values", arguments.get("cache"))
    if cache is not None and cache.get_seq_length():
        raise ScopeError(
            f"router {router!r} chooses by the text of a row, and this call has a cache with tokens that it has not "
            "seen: use generate(), or call the model with the whole text"
        )


def context_lengths(router: str, rows: Sequence[Sequence[int]], refresh: int) -> list[list[int]]:
    """For each real token of each row, how many of the row's tokens are the context that decides on its weights.

    With a known prompt of n tokens, n for its own tokens and n + refresh * floor(i / refresh) for the i-th token after it;
    without, refresh * floor(t / refresh) for the t-th token (both from 1), and 1 before that.
    """
    prompts = current_prompts()
    if prompts is None:
        return [[max(refresh * (t // refresh), 1) for t in range(1, len(row) + 1)] for row in rows]
    if len(rows) % len(prompts.rows):
        raise ScopeError(
            f"router {router!r} knows {len(prompts.rows)} prompts, but the call has {len(rows)} rows, no multiple: call the "
            "model with the rows of the prompts"
        )
    begins = [len(prompt) for prompt in prompts.rows for _ in range(len(rows) // len(prompts.rows))]
    return [
        [n + refresh * (max(t - n, 0) // refresh) for t in range(1, len(row) + 1)]
        for row, n in zip(rows, begins, strict=True)
    ]
