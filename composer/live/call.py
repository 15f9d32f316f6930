"""A call of the model: the checks before any layer runs, the number of its rows, and the router that sees the call first.

Entry   checks modules, weights and rows: an error is raised before any cache has taken tokens
CALL    the call's rows, for the layers;  ROUTED  the router for this call, for the layers
Exit    the call is over
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Size, Tensor, nn

from loraweave.composer.live.kernels._parts import ONLY, block_of, own_precision
from loraweave.composer.live.standing_in import Hook
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.combined import ByRow, begin, derive, parts_of
from loraweave.routers.tokens._call import with_tokenizer
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import Router


class Call(NamedTuple):
    """The number of rows in a call of a model, if known; `beside` is True if the call also has images or sounds.

    A row of text may have any number of images or sounds, so a layer's first axis may count these instead of rows.
    """

    num_rows: int | None = None
    beside: bool = False


NO_CALL = Call()
# the running call of a model in this context; code made by torch.compile sees no context, and checks no rows
CALL: ContextVar[Call] = ContextVar("loraweave_call", default=NO_CALL)


def can_be_batch(num_rows: int) -> bool:
    """Return True if `num_rows` is the number of rows in the running call, or if that number is unknown."""
    rows = CALL.get().num_rows
    return rows is None or num_rows == rows


def require_own_rows(layer: str, num_rows: int) -> None:
    """Raise ScopeError if a layer's input does not have the call's number of rows and the call has images or sounds.

    Only the model knows how many of these belong to each row.
    """
    rows, beside = CALL.get()
    if rows is not None and num_rows != rows and beside:
        raise ScopeError(
            f"the weights vary by row or token, but layer {layer!r} has {num_rows} rows in a call of {rows} texts with "
            "images or sounds, and which are whose cannot be told: give one mixture for all rows, or name the other layers "
            "in MixtureWeights(layers=...)"
        )


def require_batch_first(layer: str, shape: Size) -> None:
    """Raise ScopeError for a layer's input (A, B, features) if B and not A is the number of rows in the model's call.

    XLNet, FSMT and Longformer's attention put the tokens first. If A and B are equal, the order cannot be told.
    """
    rows = CALL.get().num_rows
    if rows is not None and len(shape) == 3 and shape[0] != rows and shape[1] == rows:
        raise ScopeError(
            f"the weights vary by row or token, but the input of layer {layer!r} is {tuple(shape)}, whose second axis and "
            f"not the first is the batch's {rows} rows: give one mixture for all rows"
        )


def require_rows_of_tokens(layer: str, num_tokens: int, of_weights: int) -> None:
    """Raise ScopeError unless `num_tokens` is the call's number of rows times `of_weights`, the weights' T (1 fits any)."""
    rows, beside = CALL.get()
    tokens_per_row, rest = divmod(num_tokens, rows or 1)
    if beside or rest or (rows and of_weights not in (1, tokens_per_row)):
        raise ScopeError(
            f"the weights vary by row or token, and have {of_weights} tokens, but layer {layer!r} has {num_tokens} in a "
            f"call of {rows} rows: give weights for exactly the tokens of this call, or one mixture for all rows"
        )


def in_own_precision(router: Router) -> Router:
    """Return the router, or a ByRow of routers, wrapped to compute outside autocast and on the layers' device.

    A router that is not a TokenRouter stays as it is, since it may need autocast.
    """
    if isinstance(router, ByRow):
        # one wrapper for each router, so that a router sees a call only once
        wrapped = {part: in_own_precision(part) for part in router.routers if part is not None}
        return ByRow([None if part is None else wrapped[part] for part in router.routers], router.experts)
    if not isinstance(router, TokenRouter):
        return router
    device: torch.device | None = None

    def weigh(of_call: Router, x_BTI: Tensor, layer: str) -> Tensor:
        nonlocal device
        # the router that `begin` made for a call moves itself
        if of_call is router and x_BTI.device != device:
            with torch.inference_mode(False):
                router.to(x_BTI.device)
            device = x_BTI.device
        with own_precision(x_BTI.device) if torch._C._is_any_autocast_enabled() else nullcontext():
            return of_call.weights(x_BTI, layer)

    return derive(router, weigh, shares_weights=True)


# a call router, and the router that its `begin` made for the running call
ROUTED: ContextVar[tuple[CallRouter, Router] | None] = ContextVar("loraweave_call_router", default=None)


class CallRouter:
    """A wrapper of a router that must see each call of the model; its weights are those for the running call.

    `name` is the router's name for messages.
    """

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
        """True if the router, or a router that it is made of, chooses by text."""
        return any(getattr(part, "needs_tokenizer", False) for part in parts_of(self._router))

    @property
    def reads_prompts(self) -> bool:
        """True if weights depend on which part of a row is its prompt."""
        return self.reads_text or bool(getattr(self._router, "reads_prompts", False))

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Set the model's tokenizer, which may be None. Raises CompositionError for None if the router reads text."""
        if self.reads_text and tokenizer is None:
            raise CompositionError(
                f"router {self._name} reads the text of the model's input, and this Composer cannot: make "
                "it with tokenizer=..."
            )
        self._tokenizer = tokenizer

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Show the router the arguments of a call of the model, {name: value}, while no mixture is in force."""
        with with_tokenizer(self._tokenizer):
            of_call = begin(self._router, model, arguments)
        # for a backward pass that runs layers again
        self._last = of_call if torch.is_grad_enabled() else None
        self._num_calls = (0 if self._ran_again else self._num_calls) + torch.is_grad_enabled()
        self._ran_again = False
        ROUTED.set((self, of_call))

    def _of_call(self) -> Router | None:
        """Return the router that `begin` made for the running call, or None outside a call that began with this object."""
        running = ROUTED.get()
        return running[1] if running is not None and running[0] is self else None

    @property
    def shares_weights(self) -> bool:
        """True if the running call's router says that no tensor it returns changes before the call ends."""
        of_call = self._of_call()
        return of_call is not None and bool(getattr(of_call, "shares_weights", False))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE. ScopeError outside a call, CompositionError if checkpointing reruns a layer after several calls."""
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
    """Return the arguments of a call of the model as {name: value}."""
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


# arguments of transformers' models whose first axis are the rows of the batch
MAIN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")

# inputs that have one or more rows for each row of text; some of these are main inputs
BESIDE_TEXT = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values"})

# arguments that only transformers' continuous batching passes
PAGED_INPUTS = frozenset({"cu_seq_lens_q", "write_index"})


@dataclass(eq=False)
class Entry(Hook):
    """The hook that runs before the forward of `model`.

    `require_unchanged(experts)` raises if the model's layers have changed, or the weights that these experts were made for;
    `current()` returns the activation in force, or None. `begin` shows the call's arguments to a router that needs them.
    """

    model: ref[nn.Module]
    require_unchanged: Callable[[Iterable[str]], None]
    current: Callable[[], Any]
    begin: Callable[[CallRouter, dict[str, Any]], None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # each layer looks at its rows when the code runs
            return
        if module is not self.model():
            raise CompositionError(
                f"a replica of the model ({type(module).__name__}) runs (DataParallel), whose threads have no mixture; "
                "use one process per device, each with its own Composer"
            )
        if kwargs.keys() >= PAGED_INPUTS:
            raise CompositionError(
                "continuous batching packs requests into one row and runs the model in a thread that has no mixture: leave "
                "the activation first and use fused(), or generate() with a mixture per text"
            )
        activation = self.current()
        if activation is not None:
            plan = activation.plan
            self.require_unchanged(plan.experts)
            if plan.only != (only := ONLY.get()):
                raise ScopeError(
                    f"{block_of(only or plan.only or '')} applies to activations opened inside it, with a weight "
                    "for each row: open this one there; routers, activated LoRAs, and weights that vary by token or learn, "
                    "are for other calls"
                )
            # the tensor whose first axis is the rows of the batch
            call_input: Any = args[0] if args else None
            for name in () if args else MAIN_INPUTS:
                if (call_input := kwargs.get(name)) is not None:
                    break
            if not (isinstance(call_input, Tensor) and call_input.ndim > 1):
                call_input = None
            plan.begin_call(call_input)
            if plan.call_router is not None:
                self.begin(plan.call_router, arguments_of(module, args, kwargs))
            num_rows = None
            # features by (row * token) do not say how many rows they are
            if call_input is not None and not (call_input.ndim == 2 and call_input.is_floating_point()):
                num_rows = call_input.shape[0]
            beside = BESIDE_TEXT & kwargs.keys()
            has_more = bool(beside) and any(kwargs[name] is not None and kwargs[name] is not call_input for name in beside)
            CALL.set(Call(num_rows, has_more))


@dataclass(eq=False)
class Exit(Hook):
    """The hook that runs after the model's forward; `current()` returns the activation in force, or None."""

    current: Callable[[], Any]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            activation = self.current()
            if activation is not None and activation.followed is not None:
                activation.followed.returned(output)
            end_call()


def end_call() -> None:
    """Forget the running call of the model once it is over, whether it returned or raised."""
    # torch.compile sees no context
    if not torch.compiler.is_compiling():
        CALL.set(NO_CALL)
        ROUTED.set(None)
