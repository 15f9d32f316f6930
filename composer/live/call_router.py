"""A router in the calls of a running model: where its tensors lie, in which precision it computes, which call is running."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.live.kernels._parts import own_precision
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.combined import ByRow, begin, derive, parts_of
from loraweave.routers.tokens._call import with_tokenizer
from loraweave.routers.tokens._router import TokenRouter
from loraweave.types import Router


def in_own_precision(router: Router) -> Router:
    """Return the router, or a batch's routers, computing outside of autocast and where the layers are.

    A router that is not loraweave's stays as it is, since it may need autocast.
    """
    if isinstance(router, ByRow):
        # one object for one router, which is shown a call once
        wrapped = {part: in_own_precision(part) for part in router.routers if part is not None}
        return ByRow([None if part is None else wrapped[part] for part in router.routers], router.experts)
    if not isinstance(router, TokenRouter):
        return router
    device: torch.device | None = None

    def weigh(of_call: Router, x_BTI: Tensor, layer: str) -> Tensor:
        nonlocal device
        # a router of a call sees to that itself
        if of_call is router and x_BTI.device != device:
            with torch.inference_mode(False):
                router.to(x_BTI.device)
            device = x_BTI.device
        with own_precision(x_BTI.device) if torch._C._is_any_autocast_enabled() else nullcontext():
            return of_call.weights(x_BTI, layer)

    return derive(router, weigh, shares_weights=True)


# the call router that was asked, and the router that it returned for the running call
ROUTED: ContextVar[tuple[CallRouter, Router] | None] = ContextVar("loraweave_call_router", default=None)


class CallRouter:
    """A router that is shown each call of the model; its weights are those of the running call. `name` is for messages."""

    def __init__(self, router: Any, name: str) -> None:
        self._router = router
        self._name = name
        self._last: Router | None = None
        # the number of calls whose layers a backward pass may still run again
        self._num_calls = 0
        self._ran_again = False
        self._tokenizer: Any = None

    @property
    def reads_text(self) -> bool:
        """True if the router, or one that it is made of, chooses by text."""
        return any(getattr(part, "needs_tokenizer", False) for part in parts_of(self._router))

    @property
    def reads_prompts(self) -> bool:
        """True if weights depend on which part of a row is its prompt."""
        return self.reads_text or bool(getattr(self._router, "reads_prompts", False))

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Take the model's tokenizer, if there is one. Raises CompositionError if the router reads text and it is None."""
        if self.reads_text and tokenizer is None:
            raise CompositionError(
                f"router {self._name} reads the text of the model's input, and this Composer cannot: make "
                "it with tokenizer=..."
            )
        self._tokenizer = tokenizer

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Show the router the arguments of a call of the model, by name, while the model is without a mixture."""
        with with_tokenizer(self._tokenizer):
            of_call = begin(self._router, model, arguments)
        # for a backward pass that runs layers again
        self._last = of_call if torch.is_grad_enabled() else None
        self._num_calls = (0 if self._ran_again else self._num_calls) + torch.is_grad_enabled()
        self._ran_again = False
        ROUTED.set((self, of_call))

    def _of_call(self) -> Router | None:
        """Return the router of the running call, or None if that call is not one of this router's."""
        running = ROUTED.get()
        return running[1] if running is not None and running[0] is self else None

    @property
    def shares_weights(self) -> bool:
        """True if the running call's router says that no tensor it returns changes before the call ends."""
        of_call = self._of_call()
        return of_call is not None and bool(getattr(of_call, "shares_weights", False))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE. Raises ScopeError outside a call, CompositionError for checkpointing after several calls."""
        if (of_call := self._of_call()) is not None:
            return of_call.weights(x_BTI, layer)
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


def arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the model, by name."""
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
