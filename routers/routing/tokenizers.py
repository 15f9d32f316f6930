"""The tokenizer of the model whose call begins: a router is made without one, and may be active in several engines."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from loraweave.routers.routing.holding import holding

_TOKENIZER: ContextVar[Any] = ContextVar("loraweave_tokenizer", default=None)


def with_tokenizer(tokenizer: Any) -> AbstractContextManager[None]:
    """Hands a tokenizer to the routers that begin inside."""
    return holding(_TOKENIZER, tokenizer)


def current_tokenizer() -> Any:
    """None outside, and where the engine has none."""
    return _TOKENIZER.get()
