"""Context variables that tell routers about the running call and the running model.

About the call: the prompts of its rows, the tokens in its cache, and the tokenizer. A call alone does not tell prompt from
answer, so code that generates or scores announces prompts by `prompted`. About the model: the input of the running block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraweave.common.process import holding
from loraweave.errors import ScopeError
from loraweave.routers.tokens._caches import BesideCache, RowsAndTokens


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts' token ids, a mask that is 0 for padding and after the prompt, and {router: kept weights}."""

    ids_BT: Tensor
    mask_BT: Tensor
    weights: WeakKeyDictionary[object, Tensor] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def rows(self) -> list[list[int]]:
        """The token ids of each prompt, without padding."""
        return real_tokens(self.ids_BT, self.mask_BT)


_PROMPTS: ContextVar[Prompts | None] = ContextVar("loraweave_prompts", default=None)


def prompted(ids_BT: Tensor, mask_BT: Tensor) -> AbstractContextManager[None]:
    """Announce the prompts that rows of calls inside the context begin with; an outer context's prompts win.

    In a batch of k times as many rows each prompt serves k consecutive rows.
    """
    return holding(_PROMPTS, _PROMPTS.get() or Prompts(ids_BT, mask_BT))


def unprompted() -> AbstractContextManager[None]:
    """Forget the prompts of an outer context inside this one, where calls have other rows."""
    return holding(_PROMPTS, None)


def current_prompts() -> Prompts | None:
    """Return the prompts of the running calls, or None if they are unknown."""
    return _PROMPTS.get()


def count_copies(router: str, prompts: Prompts, num_rows: int) -> int:
    """Return how many consecutive rows each prompt serves. Raises ScopeError, naming `router`, if they do not divide."""
    if not num_rows or num_rows % len(prompts.rows):
        raise ScopeError(
            f"router {router!r} knows {len(prompts.rows)} prompts, but the call has {num_rows} rows, not a multiple: call "
            "the model with the rows of the prompts"
        )
    return num_rows // len(prompts.rows)


def real_tokens(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    """Return the ids of each row where its mask is not 0."""
    pairs = zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in pairs]


def cache_of(arguments: Mapping[str, Any]) -> Any | None:
    """Return the key-value cache among the arguments of a call of the model, or None."""
    names = ("cache", "past_key_values")
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


@dataclass(frozen=True, eq=False)
class CallText:
    """The ids and mask of all tokens so far; the first `num_first` began the cache, the last `num_new` are new."""

    ids_BT: Tensor
    mask_BT: Tensor
    num_first: int
    num_new: int

    @classmethod
    def of(cls, router: str, beside: BesideCache[SeenTokens], arguments: Mapping[str, Any]) -> Self:
        """Return the text of a call of the model, and keep its tokens `beside` the cache from now on.

        `router` is a name for messages. Raises ScopeError for a call by embeddings, for a mask that does not say which
        tokens are real, and for a cache with tokens that the router has not seen.
        """
        new_BT, cache = arguments.get("input_ids"), cache_of(arguments)
        if not isinstance(new_BT, Tensor):
            raise ScopeError(
                f"router {router!r} chooses by the text of a row, and this call of the model has no input_ids: call it with "
                "token ids, or generate() from them"
            )
        state = None if cache is None else _find_seen(beside, cache, len(new_BT))
        if state is None:
            state = SeenTokens(new_BT)
        else:
            state.append(new_BT)
        beside.keep(cache, state)
        mask_BT = _mask(router, arguments.get("attention_mask"), state.ids_BT)
        return cls(state.ids_BT, mask_BT, state.num_first, new_BT.shape[1])

    def rows(self) -> list[list[int]]:
        """Return each row's token ids among its first `num_first`, without padding."""
        return real_tokens(self.ids_BT[:, : self.num_first], self.mask_BT[:, : self.num_first])

    def contexts(self, router: str, refresh: int) -> tuple[list[list[int]], Tensor]:
        """Return (contexts, real_BT): for each new real token, row by row, the token ids that its weights depend on.

        real_BT marks the new tokens that are real. A context grows after every `refresh` tokens (`context_length`).
        """
        rows, own_BT = real_tokens(self.ids_BT, self.mask_BT), self.mask_BT[:, -self.num_new :].bool()
        begins = _prompt_lengths(router, len(rows))
        contexts = []
        for row, num_own, begin in zip(rows, own_BT.sum(dim=1).tolist(), begins, strict=True):
            numbers = range(len(row) - num_own + 1, len(row) + 1)
            contexts += [row[: context_length(number, begin, refresh)] for number in numbers]
        return contexts, own_BT


def context_length(number: int, num_prompt: int | None, refresh: int) -> int:
    """Return how many tokens of a row decide on the weights of its token `number`, counted from 1.

    With a prompt of n tokens: n for each of these, and n + refresh * floor(i / refresh) for the i-th after them. If the
    prompt is unknown (None): refresh * floor(number / refresh), at least 1.
    """
    if num_prompt is None:
        return max(refresh * (number // refresh), 1)
    return num_prompt + refresh * (max(number - num_prompt, 0) // refresh)


def _find_seen(beside: BesideCache[SeenTokens], cache: Any, num_rows: int) -> SeenTokens | None:
    """Return the tokens that a cache holds: those noted beside it, or else the prompts if they have as many tokens."""
    prompts = current_prompts()
    try:
        return beside.of(cache)
    except ScopeError:
        # a cache that the model made itself in a call without one
        if prompts is None or cache.get_seq_length() != prompts.ids_BT.shape[1]:
            raise
        return SeenTokens(prompts.ids_BT.repeat_interleave(num_rows // len(prompts.ids_BT), dim=0))


def _mask(router: str, mask_BT: Tensor | None, ids_BT: Tensor) -> Tensor:
    if mask_BT is None:
        return torch.ones_like(ids_BT)
    shape = getattr(mask_BT, "shape", None)
    if shape != ids_BT.shape:
        shown = type(mask_BT).__name__ if shape is None else tuple(shape)
        raise ScopeError(
            f"router {router!r} chooses by the text of a row, and cannot tell from the attention mask {shown} which of its "
            f"tokens {tuple(ids_BT.shape)} are real: give a mask of that shape, or none"
        )
    return mask_BT


def _prompt_lengths(router: str, num_rows: int) -> Sequence[int | None]:
    prompts = current_prompts()
    if prompts is None:
        return [None] * num_rows
    copies = count_copies(router, prompts, num_rows)
    return [len(prompt) for prompt in prompts.rows for _ in range(copies)]


def count_rows(arguments: Mapping[str, Any]) -> int:
    """Return the number of rows in the arguments of a call of the model; 0 if unknown."""
    tensors = (arguments.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds", "decoder_inputs_embeds"))
    return next((len(tensor) for tensor in tensors if tensor is not None), 0)


def asked_of_head(w_BTE: Tensor, num_tokens: int, logits_to_keep: int | Tensor | None) -> Tensor:
    """Return w_BTE of the tokens that the language head computes, for a layer that sees fewer tokens than the call has.

    `logits_to_keep` is the call's argument: a number of last tokens, or the tokens' indices.
    """
    if logits_to_keep is None or w_BTE.shape[1] in (1, num_tokens):
        return w_BTE
    return w_BTE[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else w_BTE[:, logits_to_keep]


class CachedIds(RowsAndTokens):
    """The ids_BT of the tokens in a cache."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def append(self, ids_BT: Tensor) -> None:
        self.ids_BT = torch.cat([self.ids_BT, ids_BT], dim=1)

    def get_seq_length(self) -> int:
        return self.ids_BT.shape[1]

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        self.ids_BT = make(self.ids_BT)


class SeenTokens(CachedIds):
    """The ids_BT of the tokens in a cache; the first `num_first` came in the call that began the cache."""

    def __init__(self, ids_BT: Tensor) -> None:
        super().__init__(ids_BT)
        self.num_first = ids_BT.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.num_first = min(self.num_first, self.get_seq_length())


_TOKENIZER: ContextVar[Any] = ContextVar("loraweave_tokenizer", default=None)


def with_tokenizer(tokenizer: Any) -> AbstractContextManager[None]:
    """Let routers that are shown a call read text with this tokenizer inside the context."""
    return holding(_TOKENIZER, tokenizer)


def current_tokenizer() -> Any:
    """Return the tokenizer of the running call; None outside of one, or if the engine has none."""
    return _TOKENIZER.get()


def has_two_sequences(model: Any) -> bool:
    """Return True if the model has an encoder and a decoder, whose tokens differ."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def block_of(layer: str) -> str | None:
    """Return the path of the block that a layer lies in, up to the first number; None for a layer outside blocks."""
    match = re.match(r"(.*?(?:^|\.)\d+)\.", layer)
    return match[1] if match else None


@dataclass(frozen=True, eq=False)
class BlockInput:
    """The hidden states x_BTI given to a running block, and `kept`, {router: its data until the block has run}.

    `block` is the block's path. `beside` are the addresses of other tensors given to the block, such as an encoder's states;
    `outer` is the input of the nearest watched module around the block, if any.
    """

    block: str
    x_BTI: Tensor
    beside: frozenset[int]
    kept: WeakKeyDictionary[object, Any] = field(default_factory=WeakKeyDictionary)
    outer: BlockInput | None = None


# per thread, the input of the running block, also in autograd's thread when a block runs again
_RUNNING: ContextVar[BlockInput | None] = ContextVar("loraweave_block_input", default=None)


def running(block_input: BlockInput) -> AbstractContextManager[None]:
    """Make `block_input` the input of the running block inside the context."""
    return holding(_RUNNING, replace(block_input, outer=_RUNNING.get()))


def running_block(router: str, layer: str, x_BTI: Tensor, block: str | None = None) -> BlockInput:
    """Return the input of the layer's block, or of the watched module around the layer whose path is `block`.

    Raises ScopeError outside a call of the block, and for a layer whose input x_BTI is not of the block's tokens. `router`
    is a name for messages.
    """
    block_input, block = _RUNNING.get(), block or block_of(layer)
    while block_input is not None and block_input.block != block:
        block_input = block_input.outer
    if block_input is None:
        raise ScopeError(
            f"router {router!r} looks at the input of {block!r}, but layer {layer!r} ran in no call of it: call the model "
            "itself rather than a part of it, and not one that torch.compile made"
        )
    if x_BTI.shape[:2] != block_input.x_BTI.shape[:2] or x_BTI.data_ptr() in block_input.beside:
        raise ScopeError(
            f"router {router!r} weighs the {tuple(block_input.x_BTI.shape[:2])} rows and tokens of {block!r}, but layer "
            f"{layer!r} sees {tuple(x_BTI.shape[:2])} others: an encoder's, those of one expert of several, or some rows "
            "alone. Leave the layer out of the adapters, or take a router that looks at the layer's own input"
        )
    return block_input
