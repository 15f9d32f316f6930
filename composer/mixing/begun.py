"""Routers that look at a call's whole input before its first layer runs (`begin`), and what they made of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.routing.parts import parts_of
from loraweave.routers.routing.tokenizers import with_tokenizer
from loraweave.types import Router

# the router that was asked, and the one that it gave for the running call
_CALL: ContextVar[tuple[Begun, Router] | None] = ContextVar("loraweave_begun", default=None)


class Begun:
    """Such a router, as one whose weights are those of the running call; `name` is for messages."""

    def __init__(self, router: Any, name: str) -> None:
        self._router = router
        self._name = name
        self._last: Router | None = None
        # those that a backward pass may still run layers of again
        self._num_calls = 0
        self._ran_again = False
        self._tokenizer: Any = None

    @property
    def reads_text(self) -> bool:
        """Whether the router, or one that it is made of, chooses by text."""
        return any(getattr(part, "needs_tokenizer", False) for part in parts_of(self._router))

    def take_tokenizer(self, tokenizer: Any) -> None:
        """The tokenizer of the model, for routers that read text. CompositionError where one needs it and it is None."""
        if self.reads_text and tokenizer is None:
            raise CompositionError(
                f"router {self._name} reads the text of the model's input, and this Composer cannot: make "
                "it with tokenizer=..."
            )
        self._tokenizer = tokenizer

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Shows the router the arguments of a call of the model, by name, while the model is without a mixture."""
        with with_tokenizer(self._tokenizer):
            found = self._router.begin(model, arguments)
        # for a backward pass that runs layers again
        self._last = found if torch.is_grad_enabled() else None
        self._num_calls = (0 if self._ran_again else self._num_calls) + torch.is_grad_enabled()
        self._ran_again = False
        _CALL.set((self, found))

    @property
    def shares_weights(self) -> bool:
        """Whether the router of the running call says that no tensor it gives changes before the call ends."""
        found = _CALL.get()
        return found is not None and found[0] is self and bool(getattr(found[1], "shares_weights", False))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE. Raises ScopeError outside a call of the model."""
        found = _CALL.get()
        if found is not None and found[0] is self:
            return found[1].weights(x_BTI, layer)
        # gradient checkpointing runs layers again when the call has ended
        if self._last is not None and torch._C._current_graph_task_id() != -1:
            if self._num_calls > 1:
                raise CompositionError(
                    f"gradient checkpointing runs layer {layer!r} again after {self._num_calls} calls of the model, and "
                    f"router {self._name} cannot tell of which: call backward() after each, or do without that; a call "
                    "without a backward() belongs under torch.no_grad()"
                )
            self._ran_again = True
            return self._last.weights(x_BTI, layer)
        raise ScopeError(
            f"router {self._name} looks at the input of the whole model first, but layer {layer!r} ran in "
            "none of its calls: call the model itself rather than a part of it, and not one that torch.compile made"
        )


def end_begun() -> None:
    """The running call is over."""
    if not torch.compiler.is_compiling():
        _CALL.set(None)


def arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model, by name."""
    signature = inspect.signature(model.forward)
    found = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found
