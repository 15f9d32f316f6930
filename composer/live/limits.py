"""The layers of a model that a live mixture cannot reach, or not row by row; asked for when a mixture is activated.

In a layer that its owner does not call an update would be lost without a word: an error once the owner has run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from loraweave.composer.live.experts import computes_as_known
from loraweave.composer.live.standing_in import Hook
from loraweave.composer.model.layers import TargetLayer, use_of
from loraweave.errors import CompositionError, LayerMismatch, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.combined import needs_call, parts_of, rows_of
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router


class Handle(Protocol):
    """A change that an activation makes to a model, and takes back at its end."""

    def remove(self) -> None: ...


class LiveLimits:
    """The limits of one model's target layers; `add` takes those of adapters that are opened later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # the layers that never run, and those whose first axis need not be the batch, each with the reason as a phrase
        self._never_called: dict[str, str] = {}
        self._out_of_order: dict[str, str] = {}
        # the layers that are experts of fused parameters
        self._experts: set[str] = set()

    def add(self, layers: Mapping[str, TargetLayer]) -> None:
        """Add the limits of these layers."""
        embeddings = {name for name, layer in layers.items() if isinstance(layer.module, nn.Embedding)}
        of_tokens = _token_embeddings(self._model) if embeddings else None
        for name, layer in layers.items():
            if layer.number is not None:
                self._experts.add(name)
                if not computes_as_known(layer.module):
                    self._never_called[name] = (
                        f"one of the experts of a {type(layer.module).__name__}, whose forward is its own"
                    )
                continue
            place, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(place)
            # MultiheadAttention is the owner of such a layer, in which it keeps a weight for its own product
            if isinstance(layer.module, NonDynamicallyQuantizableLinear) or use_of(owner, attribute) == "read":
                self._never_called[name] = f"which its {type(owner).__name__} never calls, computing with its weight itself"
            if re.search(r"(^|\.)experts\.(expert_)?\d+\.", name):
                self._out_of_order[name] = "sees the tokens that are routed to it, in an order of their own"
            elif name in embeddings and of_tokens is not None and id(layer.module) not in of_tokens:
                self._out_of_order[name] = "is no embedding of tokens, and may be called once for all rows"

    def require(self, weights: MixtureWeights | Router, adapters: Mapping[str, Adapter], *, by_token: bool = False) -> None:
        """Raise LayerMismatch or ScopeError where these weights cannot count live in one of the layers.

        LayerMismatch: a layer that never runs has weights that are not zero, or a router's. ScopeError: weights vary by row
        or token in a layer whose first axis need not be the batch, or a router looks beyond the input of a fused parameter's
        expert. A router for all rows computes its weights from the layer's own input, whatever the order of that is, unless
        they are said to vary `by_token`: by a place in each row.
        """
        rows = rows_of(weights)
        for name, why in self._never_called.items():
            for expert in _users(name, rows, adapters):
                raise LayerMismatch(
                    f"expert {expert!r} updates layer {name!r}, {why}: use fused(), which changes the weight"
                )
        routers = [row for row in rows if row is not None and not isinstance(row, MixtureWeights)]
        looks_beyond = routers and (
            len(rows) > 1 or needs_call(weights) or any(getattr(part, "watched", ()) for part in parts_of(weights))
        )
        for name in self._experts if looks_beyond or by_token else ():
            for expert in _users(name, rows, adapters):
                raise ScopeError(
                    f"expert {expert!r} updates layer {name!r}, an expert of a fused parameter, for which weights come "
                    "from its own input alone or are given: take a router that looks at no call and no block, the same "
                    "for all rows, or MixtureWeights, and no adapter with invocation tokens beside it"
                )
        # a row or token is told from its place on an axis
        varies = "row" if len(rows) > 1 else "token" if by_token else _VARIES.get(getattr(weights, "scope", ""), "")
        for name, why in self._out_of_order.items() if varies else ():
            for expert in _users(name, rows, adapters):
                raise ScopeError(
                    f"the weights vary by {varies}, but layer {name!r}, which "
                    f"expert {expert!r} updates, {why}: give one mixture for all rows, or name the other layers in "
                    "MixtureWeights(layers=...)"
                )


# what weights vary by, by their scope
_VARIES = {"instance": "row", "token": "token"}


def _users(layer: str, rows: Iterable[Router | None], adapters: Mapping[str, Adapter]) -> Iterable[str]:
    """Yield the experts that update the layer and may have a weight there that is not zero: a router may use all of them."""
    for row in rows:
        names: Iterable[str] = () if row is None else adapters
        if isinstance(row, MixtureWeights):
            names = compress(row.experts, (row.for_layer(layer) != 0).flatten(0, 1).any(dim=0).tolist())
        yield from (name for name in names if layer in adapters[name].layers)


def _token_embeddings(model: nn.Module) -> set[int] | None:
    """Return the ids of the modules that a transformers model calls its input embeddings; None for another kind of model."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    embedding_ids = set()
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            try:
                embedding_ids.add(id(module.get_input_embeddings()))  # type: ignore[operator]
            # a part of a model without tokens
            except (NotImplementedError, AttributeError):
                continue
    return embedding_ids


def watch(
    name: str, module: nn.Module, owner: nn.Module, expected: Callable[[], bool]
) -> list[RemovableHandle | _OwnForward]:
    """Return hooks that raise CompositionError when the owner has run without a call of the layer, which was `expected`."""
    seen = threading.local()
    traced = _Traced()

    def begin() -> None:
        if torch.compiler.is_compiling():
            traced.called = False
        else:
            seen.called = False

    def call() -> None:
        if torch.compiler.is_compiling():
            traced.called = True
        else:
            seen.called = True

    def require_unexpected() -> None:
        if expected():
            raise CompositionError(
                f"layer {name!r} did not run: its {type(owner).__name__} computed with its weight itself, as it does for "
                "some settings and on some devices, and the live update would be lost; use fused(), or another setting"
            )

    # what is expected is known when the code runs, and not when it is traced
    outside = torch.compiler.disable(require_unexpected)  # type: ignore[no-untyped-call]

    def end() -> None:
        if torch.compiler.is_compiling():
            if not traced.called:
                outside()
        elif not getattr(seen, "called", True):
            require_unexpected()

    return [
        _OwnForward(owner),
        owner.register_forward_pre_hook(Step(begin)),
        module.register_forward_hook(Step(call)),
        owner.register_forward_hook(Step(end)),
    ]


class _Traced:
    """A flag: True if traced code calls the layer. One thread traces at a time; its own values would break the graph."""

    called = True


class _OwnForward:
    """The class's forward as a module's own, until `remove`: torch.compile then compiles anew, with the hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = None if "forward" in vars(module) else MethodType(type(module).forward, module)
        if self._forward is not None:
            module.forward = self._forward

    def remove(self) -> None:
        if self._forward is not None and vars(self._module).get("forward") is self._forward:
            del self._module.forward


class Step(Hook):
    """A hook that ignores its arguments."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self, *given: Any) -> None:
        self._step()


def in_backward_thread() -> bool:
    """Return whether this is a thread of autograd's own, which runs a backward pass."""
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)
