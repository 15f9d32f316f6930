"""Readers of the running model for routers: its last hidden states, and the input of the block that is running."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraweave.common.process import holding
from loraweave.errors import ScopeError
from loraweave.routers.tokens._caches import BesideCache
from loraweave.routers.tokens._call import CACHE_NAMES, cache_of, has_two_sequences

if TYPE_CHECKING:
    from transformers import DynamicCache


# arguments for the whole model that its decoder does not take, or that ask for more than is read here
OF_THE_MODEL = (
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
)


def last_hidden(router: str, model: Any, arguments: Mapping[str, Any], beside: BesideCache[DynamicCache]) -> Tensor:
    """Return hidden_BTD after the last layer and its norm, for a call of the model with these arguments; no gradient.

    Under the caller's cache only the new tokens run: those before are in a cache of the router's own, which lies `beside`
    it. Raises ScopeError for an encoder-decoder and for a model that gives no last hidden state, and what `BesideCache.of`
    raises.
    """
    if has_two_sequences(model):
        raise ScopeError(
            f"router {router!r} reads the last hidden state of the very tokens that it weighs, and {type(model).__name__} "
            "has an encoder and a decoder, whose tokens differ: take one that looks at each layer's input, or at the text"
        )
    decoder = getattr(model, "base_model", model)
    cache = cache_of(arguments)
    passed = {name: value for name, value in arguments.items() if name not in (*OF_THE_MODEL, *CACHE_NAMES)}
    parameters = inspect.signature(decoder.forward).parameters
    own_cache = None
    if cache is not None:
        own_cache = beside.of(cache)
        own_cache = _cache_like(cache, model) if own_cache is None else own_cache
    elif _makes_cache(model, arguments):
        own_cache = _cache_like(None, model)
    if own_cache is not None:
        passed["cache" if "cache" in parameters else "past_key_values"] = own_cache
    if "use_cache" in parameters:
        passed["use_cache"] = own_cache is not None
    with torch.no_grad():
        hidden: Any = getattr(decoder(**passed), "last_hidden_state", None)
    if getattr(hidden, "ndim", 0) != 3:
        raise ScopeError(
            f"router {router!r} reads the last hidden state (rows, tokens, features), and {type(decoder).__name__} gives "
            "none: take a router that looks at each layer's input"
        )
    if own_cache is not None:
        beside.keep(cache, own_cache)
    return hidden  # type: ignore[no-any-return]


def _makes_cache(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether a call that is given no cache returns one."""
    wanted = arguments.get("use_cache")
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        return False
    return bool(getattr(model.config, "use_cache", False) if wanted is None else wanted)


def _cache_like(cache: Any | None, model: Any) -> DynamicCache:
    """Make an empty cache for the same model, which keeps tokens to be taken back if `cache` does."""
    from transformers import DynamicCache

    empty: Any = DynamicCache(config=model.config)
    if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
        empty.activate_past_recording()
    return empty  # type: ignore[no-any-return]


def block_of(layer: str) -> str | None:
    """Return the path of the block that a layer lies in, up to the first number; None for a layer outside blocks."""
    match = re.match(r"(.*?(?:^|\.)\d+)\.", layer)
    return match[1] if match else None


@dataclass(frozen=True, eq=False)
class BlockInput:
    """The hidden states that a running block was given, and what routers keep of them until it has run.

    `beside` are the addresses of other tensors that it was given, such as an encoder's states; `outer` is what the block was
    given that it lies in, of those that are watched.
    """

    block: str
    x_BTI: Tensor
    beside: frozenset[int]
    kept: WeakKeyDictionary[object, Any] = field(default_factory=WeakKeyDictionary)
    outer: BlockInput | None = None


# of the running call, in each thread; autograd's own has it while it runs a block again
_RUNNING: ContextVar[BlockInput | None] = ContextVar("loraweave_block_input", default=None)


def running(block_input: BlockInput) -> AbstractContextManager[None]:
    """Make `block_input` the input of the running block inside the context."""
    return holding(_RUNNING, replace(block_input, outer=_RUNNING.get()))


def running_block(router: str, layer: str, x_BTI: Tensor, block: str | None = None) -> BlockInput:
    """Return the input of the layer's block, or of another watched module, named by its path, that the layer lies in.

    Raises ScopeError outside a call of the block, and for a layer whose input x_BTI is not of the block's tokens.
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
