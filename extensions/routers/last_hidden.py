"""The hidden states after a model's last layer, for a call with or without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraweave import ScopeError
from loraweave.extend.routing import BesideCache, cache_of, has_two_sequences

if TYPE_CHECKING:
    from transformers import DynamicCache

# the names that models give the argument with a cache
OF_THE_CACHE = ("cache", "past_key_values")
# arguments for the whole model that its decoder does not take, or that ask for outputs not needed here
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

    With the caller's cache only the new tokens run: the router's own cache, kept `beside` the caller's, has the earlier
    tokens. `router` is a name for messages. Raises ScopeError for an encoder-decoder and for a model without a last hidden
    state, and the errors of `BesideCache.of`.
    """
    if has_two_sequences(model):
        raise ScopeError(
            f"router {router!r} reads the last hidden state of the very tokens that it weighs, and {type(model).__name__} "
            "has an encoder and a decoder, whose tokens differ: take one that looks at each layer's input, or at the text"
        )
    decoder = getattr(model, "base_model", model)
    cache = cache_of(arguments)
    passed = {name: value for name, value in arguments.items() if name not in (*OF_THE_MODEL, *OF_THE_CACHE)}
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
    """Return True if a call without a cache among its arguments returns one."""
    wanted = arguments.get("use_cache")
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        return False
    return bool(getattr(model.config, "use_cache", False) if wanted is None else wanted)


def _cache_like(cache: Any | None, model: Any) -> DynamicCache:
    """Return an empty cache for the model, which records past tokens for cropping if `cache` does."""
    from transformers import DynamicCache

    empty: Any = DynamicCache(config=model.config)
    if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
        empty.activate_past_recording()
    return empty  # type: ignore[no-any-return]
