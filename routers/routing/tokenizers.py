"""The tokenizer of the model whose call begins: a router is made without one, and may be active in several engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_TOKENIZER: ContextVar[Any] = ContextVar("loraweave_tokenizer", default=None)


@contextmanager
def with_tokenizer(tokenizer: Any) -> Iterator[None]:
    """Hands a tokenizer to the routers that begin inside."""
    token = _TOKENIZER.set(tokenizer)
    try:
        yield
    finally:
        _TOKENIZER.reset(token)


def current_tokenizer() -> Any:
    """None outside, and where the engine has none."""
    return _TOKENIZER.get()
