"""Notices a layer that its owner calls in one case and computes with itself in another, as mamba's and bloom's do.

In the second case a live update would be lost without a word, so that it is an error as soon as the owner has run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loraweave.composer.mixing.standing_in import StandIn
from loraweave.errors import CompositionError


def watch(
    name: str, module: nn.Module, owner: nn.Module, expected: Callable[[], bool]
) -> list[RemovableHandle | _OwnForward]:
    """Hooks that raise CompositionError when the owner has run without calling the layer, although it was `expected`."""
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
    """Whether code that torch.compile traces calls the layer: one thread traces at a time, and a thread's own values would
    break its graph."""

    called = True


class _OwnForward:
    """Its class's forward as the module's own, until `remove`: what torch.compile made before is then made anew, with the
    hooks, which it takes for something that never changes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = None if "forward" in vars(module) else MethodType(type(module).forward, module)
        if self._forward is not None:
            module.forward = self._forward

    def remove(self) -> None:
        if self._forward is not None and vars(self._module).get("forward") is self._forward:
            del self._module.forward


class Step(StandIn):
    """A hook that looks at nothing it is given; that of a copied or unpickled model does nothing."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self, *given: Any) -> None:
        self._step()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _get_nothing, ()


def _nothing(*given: Any) -> None:
    """The hook of a copied model."""


def _get_nothing() -> Callable[..., None]:
    return _nothing
