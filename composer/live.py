"""Live mixing: forward hooks on the target layers that add what the current context's activation asks for.

The hooks exist only while an activation is open. Which one counts is a context variable, so threads and asyncio tasks do
not see each other's mixtures, and one without a mixture gets the plain base. Nothing else in the model changes: its
class, parameters and state_dict stay, and a copy or a pickle of it carries hooks that do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.composer.layers import TargetLayer
from loraweave.composer.plan import Plan
from loraweave.errors import AlreadyActive, CompositionError

T = TypeVar("T")

_CURRENT: ContextVar[Activation | None] = ContextVar("loraweave_activation", default=None)

_CLAIM_LOCK = threading.Lock()
_CLAIMS: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def claim(owner: object, modules: Iterable[nn.Module]) -> None:
    """Takes the modules for one owner. Raises AlreadyActive, having taken none, when another owner holds one of them."""
    modules = list(modules)
    with _CLAIM_LOCK:
        if any(_CLAIMS.get(module, owner) is not owner for module in modules):
            raise AlreadyActive(
                "another Composer is active on this model, or has fused into it; leave that one first, or use one Composer "
                "with a pool of all adapters"
            )
        for module in modules:
            _CLAIMS[module] = owner


def release(owner: object, modules: Iterable[nn.Module]) -> None:
    """Gives back what `owner` had claimed."""
    with _CLAIM_LOCK:
        for module in modules:
            if _CLAIMS.get(module) is owner:
                del _CLAIMS[module]


class Activation:
    """An open activation. `close()` or leaving its `with` block ends it; ending it twice does nothing."""

    def __init__(self, live: LiveLayers, plan: Plan, outer: Activation | None) -> None:
        self.live = live
        self.plan = plan
        self.outer = outer
        self.closed = False
        self._thread = threading.current_thread()

    def close(self) -> None:
        """Ends the activation. Raises AlreadyActive, and changes nothing, while an inner one is open in this context, or
        in another thread than the one that opened it (unless that thread has ended)."""
        if self.closed:
            return
        current = _current(self.live)
        if current is not self and current is not None and self in _chain(current):
            raise AlreadyActive("an activation that was opened later is still open: close that one first")
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            raise AlreadyActive(
                f"this activation was opened by thread {self._thread.name!r} and counts only there: close it in that thread"
            )
        self._end()

    def run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `call` returns, under this activation's mixture, in whatever thread it is called.

        For threads that one starts oneself: `Thread(target=activation.run, args=(model.generate,), kwargs=batch)`. A run
        that has begun keeps the mixture to its end, also when the activation is closed meanwhile.
        Raises CompositionError when it is closed before.
        """
        if self.closed:
            raise CompositionError("this activation is closed, and runs nothing: call run() while it is open")
        with self.live.open(self.plan):
            return call(*args, **kwargs)

    def _end(self) -> None:
        self.live.end(self)
        current = _CURRENT.get()
        if current is not None and current.closed:
            _CURRENT.set(_nearest_open(current))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # whatever was opened inside and not closed ends too, so that an exception leaves nothing active
        current = _current(self.live)
        if current is not None and self in _chain(current):
            for inner in _chain(current):
                if inner is self:
                    break
                if inner.live is self.live:
                    inner._end()
        self._end()


def _chain(activation: Activation | None) -> Iterable[Activation]:
    while activation is not None:
        yield activation
        activation = activation.outer


def _nearest_open(activation: Activation | None) -> Activation | None:
    return next((each for each in _chain(activation) if not each.closed), None)


def _current(live: LiveLayers) -> Activation | None:
    """The innermost open activation of these layers in this context."""
    return next((each for each in _chain(_CURRENT.get()) if each.live is live and not each.closed), None)


class LiveLayers:
    """The target layers of one Composer, with hooks on them as long as an activation is open in any thread."""

    def __init__(self, model: nn.Module, layers: Mapping[str, TargetLayer]) -> None:
        self._model = model
        self._layers = dict(layers)
        self._modules = [model, *(layer.module for layer in self._layers.values())]
        self._lock = threading.RLock()
        self._open: list[Activation] = []
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether an activation is open, in whatever thread."""
        return bool(self._open)

    def open(self, plan: Plan) -> Activation:
        """A new activation, which replaces the outer one in this context until it is closed."""
        activation = Activation(self, plan, _nearest_open(_CURRENT.get()))
        try:
            with self._lock:
                if not self._open:
                    self._install()
                self._open.append(activation)
            _CURRENT.set(activation)
        except BaseException:
            activation._end()
            raise
        return activation

    def add(self, layers: Mapping[str, TargetLayer]) -> None:
        """Takes more target layers: those of an adapter that was opened later. Open activations then reach them too."""
        with self._lock:
            more = {name: layer for name, layer in layers.items() if name not in self._layers}
            if self._open:
                num_hooked = len(self._handles)
                claim(self, [layer.module for layer in more.values()])
                try:
                    self._hook(more)
                except BaseException:
                    self._unhook(num_hooked)
                    raise
            self._layers |= more
            self._modules += [layer.module for layer in more.values()]

    def end(self, activation: Activation) -> None:
        """Closes the activation; with the last one, the hooks go."""
        with self._lock:
            activation.closed = True
            if activation in self._open:
                self._open.remove(activation)
            if not self._open:
                self._uninstall()

    def current(self) -> Activation | None:
        """What counts for the running call."""
        activation = _current(self)
        if activation is None and _in_backward_thread():
            # gradient checkpointing runs the forward again in a thread of autograd's own, which has no context
            candidates = list(self._open)
            if len(candidates) > 1:
                raise CompositionError(
                    f"gradient checkpointing runs a layer again while {len(candidates)} activations are open, and cannot "
                    "tell which it belongs to; train in one thread with one activation, or without checkpointing"
                )
            return candidates[0] if candidates else None
        return activation

    def _install(self) -> None:
        compiled = [name for name, part in self._model.named_modules() if getattr(part, "_compiled_call_impl", None)]
        if compiled:
            raise CompositionError(
                f"module {compiled[0] or 'the model'!r} was compiled before, and compiled code never sees the adapters; "
                "activate() on the uncompiled model, or fuse"
            )
        claim(self, self._modules)
        self._hook(self._layers)

    def _hook(self, layers: Mapping[str, TargetLayer]) -> None:
        for layer in layers.values():
            hook: Callable[..., Any] = _Hook(self, layer)
            # first among the hooks: the others then see the layer as if its own weights were the mixture's
            self._handles.append(layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def _unhook(self, num_left: int) -> None:
        while len(self._handles) > num_left:
            self._handles[-1].remove()
            self._handles.pop()

    def _uninstall(self) -> None:
        self._unhook(0)
        release(self, self._modules)


class _Hook:
    """Adds the current activation's update to the output of one layer."""

    def __init__(self, live: LiveLayers, layer: TargetLayer) -> None:
        self._live = live
        self._layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        if module is not self._layer.module:
            raise CompositionError(
                f"layer {self._layer.name!r} runs as a replica of the model (DataParallel), whose threads have no mixture; "
                "use one process per device, each with its own Composer"
            )
        activation = self._live.current()
        if activation is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return activation.plan.apply(self._layer, x, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _get_inert, ()


def _inert(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """The hook of a copied model: does nothing."""


def _get_inert() -> Callable[..., None]:
    return _inert


def _in_backward_thread() -> bool:
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and isinstance(threading.current_thread(), threading._DummyThread)
