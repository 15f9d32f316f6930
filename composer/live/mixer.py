"""Live mixing: while an activation is open, each target layer's `forward` adds the update of the context's mixture.

    y' = y + ((x a^T) * w) b^T + sum over e of w_e (gain_e y0 + bias_e)         y = W x + bias, y0 = W x

    the model     plain --- first activation: _install ---> each target layer's forward is _MixedForward.run,
                        <--- last one's end: _uninstall --- the model has the hooks Entry and Exit
    a context     _CURRENT -> inner Activation -> outer Activation -> None      the innermost open one applies
                                |- plan    the weights, and how each layer adds them (plan.py)
                                |- lease   the experts' factors where the layers are (residents.py)
                                '- usage   the weights that each layer used (recording.py)
    a call        Entry: checks modules, rows and router -> layers -> Exit; CALL has the rows meanwhile
    a layer       _MixedForward.run -> Plan.apply -> a kernel's adder, cached for steps of generation

The activation that applies is a context variable, so threads and asyncio tasks do not see each other's mixtures, and a
thread without a mixture runs the plain base. Nothing else in the model changes: its class, parameters and state_dict stay,
and a copy or a pickle of it has its own forwards. Any path may be compared with `kernels/naive.py`, the plain formula.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from loraweave.common.process import holding, lock_of
from loraweave.composer.live.call import CallRouter, Entry, Exit, end_call
from loraweave.composer.live.hook import LiveHook, MixedLayer, mix_outside, traced_by
from loraweave.composer.live.plan import KEPT_BYTES, Plan, make_plan
from loraweave.composer.live.recording import Usage
from loraweave.composer.live.residents import Lease
from loraweave.composer.live.row_weights import Workspace
from loraweave.composer.live.standing_in import (
    CLAIMS,
    CleanCopies,
    Handle,
    PromptedGenerate,
    StandIn,
    WatchedBlock,
    give_back,
    in_backward_thread,
    watch,
)
from loraweave.composer.model.layers import TargetLayer, gives_new_memory
from loraweave.errors import AlreadyActive, CompositionError
from loraweave.hub.base import Parts
from loraweave.routers.combined import answering
from loraweave.routers.tokens._caches import FollowedCaches
from loraweave.routers.weights import MixtureWeights

T = TypeVar("T")
Require = Callable[[Iterable[str]], None]
_CURRENT: ContextVar[Activation | None] = ContextVar("loraweave_activation", default=None)


class Activation:
    """An open activation. `close()` or leaving its `with` block ends it; ending it twice does nothing."""

    def __init__(self, live: LiveLayers, plan: Plan, lease: Lease, outer: Activation | None) -> None:
        self.live = live
        self.plan = plan
        self.lease = lease
        self.usage = Usage(live, plan.experts, plan.mixture)
        self.outer = outer
        # a router that sees whole calls may keep state for their caches
        self.followed = None if plan.call_router is None else FollowedCaches()
        self.answering: dict[frozenset[tuple[str, float]], Activation] = {}
        self.closed = False
        self._thread = threading.current_thread()

    def apply(self, layer: TargetLayer, x: Tensor, y: Tensor) -> Tensor:
        """Return y, the layer's plain output, plus the update for the layer's input x, perhaps in y's memory."""
        return self.plan.apply(layer, x, y, self.lease, self.usage)

    def close(self) -> None:
        """End the activation, if it is open.

        Raises AlreadyActive, and changes nothing, while an inner activation is open in this context, or in a thread other
        than the one that opened it (unless that thread has ended). Once it has ended, raises WeightingError if a router's
        weights on a GPU were not finite.
        """
        if self.closed:
            return
        current = _nearest_open(_CURRENT.get(), self.live)
        if current is not self and current is not None and self in _chain(current):
            raise AlreadyActive("an activation that was opened later is still open: close that one first")
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            raise AlreadyActive(
                f"this activation was opened by thread {self._thread.name!r} and applies only there: close it in that thread"
            )
        self._end()
        self.usage.require_all()

    def run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return the result of `call`, run under this activation's mixture in whatever thread calls this method.

        It is for threads that you start: `Thread(target=activation.run, args=(model.generate,), kwargs=batch)`. A run that
        has begun keeps the mixture to its end, even if the activation is closed meanwhile. Raises CompositionError if the
        activation was closed before.
        """
        with self.live.open(self.plan, self.lease.renew()):
            return call(*args, **kwargs)

    def _end(self) -> None:
        end_call()
        self.live.end(self)
        current = _CURRENT.get()
        if current is not None and current.closed:
            _CURRENT.set(_nearest_open(current))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._leave()
        except BaseException:
            # after an interruption, finish leaving before it is raised again
            self._leave()
            raise
        if error is None:
            self.usage.require_all()

    def _leave(self) -> None:
        # whatever was opened inside and not closed ends too, so that an exception leaves nothing active
        current = _nearest_open(_CURRENT.get(), self.live)
        if current is not None and current is not self and self in _chain(current):
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


def _nearest_open(activation: Activation | None, live: LiveLayers | None = None) -> Activation | None:
    """Return the nearest open activation, from `activation` outwards, or None; `live`, if given, must own the activation."""
    while activation is not None and (activation.closed or (live is not None and activation.live is not live)):
        activation = activation.outer
    return activation


class LiveLayers:
    """The target layers of one Composer, mixed as long as an activation is open in any thread.

    `require_unchanged(experts)`, called before each forward of the model, raises if the model no longer runs these layers,
    or if weights that these experts depend on have changed.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, TargetLayer], require_unchanged: Require, hooks: Iterable[LiveHook]
    ) -> None:
        self.model = model
        self.hooks = tuple(hooks)
        self._layers = dict(layers)
        self._require_unchanged = require_unchanged
        self._modules = [model, *(layer.module for layer in self._layers.values())]
        self._lock = lock_of(self)
        self._open: list[Activation] = []
        self._handles: list[Handle] = []
        self._own_hooks = Entry(ref(model), require_unchanged, self.current, self._begin), Exit(self.current)
        # True if torch.compile cannot trace the mixture of some layer
        self._untraced = False
        # set if a graph of torch.compile would lose gradients of learned weights, or has no mixture
        self.mixes_outside: Callable[[MixedLayer, Tensor, Tensor], Tensor] | None = None
        _ALL.add(self)

    @property
    def active(self) -> bool:
        """True if an activation is open in any thread."""
        return bool(self._open)

    def open(self, plan: Plan, lease: Lease) -> Activation:
        """Open an activation, which replaces the outer one in this context until it closes and releases the lease."""
        activation = Activation(self, plan, lease, _nearest_open(_CURRENT.get()))
        try:
            plan.enter(lease, self._layers)
            with self._lock:
                if not self._open:
                    self._install()
                if plan.call_router is not None and plan.call_router.reads_prompts:
                    self._tell_prompts()
                if plan.watched:
                    self._watch(plan.watched)
                self._open.append(activation)
                self._choose_place()
            _CURRENT.set(activation)
        except BaseException:
            activation._end()
            raise
        return activation

    def add(self, layers: Mapping[str, TargetLayer]) -> None:
        """Add target layers, those of an adapter that was opened later; open activations then mix into them, too."""
        with self._lock:
            if layers.keys() <= self._layers.keys():
                return
            more = {name: layer for name, layer in layers.items() if name not in self._layers}
            if self._open:
                num_before = len(self._handles)
                CLAIMS.take(self, [layer.module for layer in more.values()])
                try:
                    self._take_over(more)
                except BaseException:
                    self._give_back(num_before)
                    raise
            self._layers |= more
            self._modules += [layer.module for layer in more.values()]

    def end(self, activation: Activation) -> None:
        """Close the activation; after the last one, the layers have their own forwards again."""
        with self._lock:
            activation.closed = True
            if activation.followed is not None:
                activation.followed.release()
            activation.lease.release()
            if activation in self._open:
                self._open.remove(activation)
                self._choose_place()
            if not self._open:
                self._uninstall()

    def _choose_place(self) -> None:
        self.mixes_outside = mix_outside() if self._untraced or any(it.plan.learns for it in self._open) else None

    def end_those_of_other_threads(self) -> None:
        """Close the activations of other threads, for a forked process, in which the parent's other threads do not exist."""
        for activation in list(self._open):
            if activation._thread is not threading.current_thread():
                self.end(activation)
        if not self._open:
            self._uninstall()

    def current(self) -> Activation | None:
        """Return the running call's activation, or None. Raises CompositionError if checkpointing finds several open."""
        activation = _nearest_open(_CURRENT.get(), self)
        if activation is None and in_backward_thread():
            # gradient checkpointing runs the forward again there, without a context
            candidates = list(self._open)
            if len(candidates) > 1:
                raise CompositionError(
                    f"gradient checkpointing runs a layer again while {len(candidates)} activations are open, and cannot "
                    "tell which it belongs to; train in one thread with one activation, or without checkpointing"
                )
            return candidates[0] if candidates else None
        return activation

    def _begin(self, router: CallRouter, arguments: dict[str, Any]) -> None:
        """Show a router a call's arguments while no mixture is in force in this context."""
        activation = self.current()
        with ExitStack() as stack:
            stack.enter_context(holding(_CURRENT, None))
            if activation is not None and activation.followed is not None:
                stack.enter_context(activation.followed.entered())
                stack.enter_context(answering(partial(self._answering, activation)))
            router.begin(self.model, arguments)

    def _answering(self, asking: Activation, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        """Put {name: weight} of `asking`'s experts in force for the block, without recording the weights."""
        key = frozenset(weights.items())
        if key not in asking.answering:
            names = asking.plan.experts
            mixture = MixtureWeights.of(weights, names)
            plan = make_plan(mixture, names, Workspace(KEPT_BYTES), lambda _: asking.plan.invocations)
            inner = asking.answering[key] = Activation(self, plan, asking.lease, None)
            inner.usage = Usage(plan, plan.experts, plan.mixture)
        return holding(_CURRENT, asking.answering[key])

    def _install(self) -> None:
        CLAIMS.take(self, self._modules)
        self._remove_own_hooks()
        self._clean_copies(self.model)
        before, after = self._own_hooks
        self._handles.append(self.model.register_forward_pre_hook(before, with_kwargs=True))
        # one that is always called has a number that torch.compile remembers; after an error, an activation's end is enough
        self._handles.append(self.model.register_forward_hook(after))
        self._take_over(self._layers)
        for hook in self.hooks if isinstance(self.model, Parts) else ():
            self._handles.extend(hook.install(self))

    def enters(self, part: nn.Module) -> Iterator[Handle]:
        """Let calls of a part of the model begin and end like the model's own, until the handles are removed."""
        self._clean_copies(part)
        before = Entry(ref(part), self._require_unchanged, self.current, self._begin)
        yield part.register_forward_pre_hook(before, with_kwargs=True)
        yield part.register_forward_hook(Exit(self.current))

    def _tell_prompts(self) -> None:
        told = any(isinstance(handle, PromptedGenerate) for handle in self._handles)
        if not told and callable(getattr(self.model, "generate", None)):
            self._handles.append(PromptedGenerate(self.model, self._begin_call))

    def _watch(self, blocks: Iterable[str]) -> None:
        known = {handle.path for handle in self._handles if isinstance(handle, WatchedBlock)}
        for path in [path for path in dict.fromkeys(blocks) if path not in known]:
            block = self.model.get_submodule(path)
            self._clean_copies(block)
            self._handles.append(WatchedBlock(path, block))

    def _clean_copies(self, module: nn.Module) -> None:
        clean = CleanCopies(module)
        self._handles.append(clean)
        clean.install()

    def _begin_call(self, arguments: dict[str, Any]) -> None:
        activation = self.current()
        if activation is not None and activation.plan.call_router is not None:
            self._begin(activation.plan.call_router, arguments)

    def _take_over(self, layers: Mapping[str, TargetLayer]) -> None:
        fused: dict[nn.Module, list[TargetLayer]] = {}
        for layer in layers.values():
            if layer.number is not None:
                fused.setdefault(layer.module, []).append(layer)
                continue
            forward = _MixedForward(self, layer)
            self._untraced = self._untraced or forward.trace is None
            self._handles.append(forward)
            self._clean_copies(layer.module)
            # a bound method: of any other object torch.compile would look at the identity
            layer.module.forward = forward.run
            if layer.owner is not None:
                self._handles.extend(self.guards(layer.name, layer.module, layer.owner, partial(self._reaches, layer.name)))
        for module, group in fused.items():
            for hook in self.hooks:
                if hook.runs_experts(module):
                    self._handles.extend(hook.take_experts(self, module, group))

    def guards(self, name: str, module: nn.Module, owner: nn.Module, expected: Callable[[], bool]) -> Iterator[Handle]:
        """Yield hooks that raise CompositionError if `owner` runs without `module` while `expected()`; copies have none."""
        self._clean_copies(module)
        self._clean_copies(owner)
        yield from watch(name, module, owner, expected)

    def _reaches(self, layer: str) -> bool:
        activation = self.current()
        return activation is not None and activation.plan.reaches(layer, activation.lease)

    def _give_back(self, num_left: int) -> None:
        while len(self._handles) > num_left:
            self._handles[-1].remove()
            self._handles.pop()

    def _uninstall(self) -> None:
        try:
            self._give_back(0)
        finally:
            # once more after an interruption, where it stopped
            self._give_back(0)
            self._remove_own_hooks()
            CLAIMS.give_back(self, self._modules)

    def _remove_own_hooks(self) -> None:
        """Remove this object's hooks, also any whose handle was not stored because of an interruption."""
        model, (before, after) = self.model, self._own_hooks
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook is before or hook is after:
                    del hooks[key]
                    model._forward_pre_hooks_with_kwargs.pop(key, None)


_ALL: WeakSet[LiveLayers] = WeakSet()


def _after_fork() -> None:
    for live in list(_ALL):
        live.end_those_of_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _MixedForward(StandIn):
    """A stand-in for one layer's `forward` while an activation is open: that forward's output, and the update on top.

    A forward hook would cost several times as much in every call, and torch.compile takes hooks for what never changes.
    """

    def __init__(self, live: LiveLayers, layer: TargetLayer) -> None:
        self._live: LiveLayers | None = live
        # the module's forward may have been replaced since the layer was looked at
        self.layer = replace(layer, fresh=layer.fresh and gives_new_memory(layer.module))
        self._own = vars(layer.module).get("forward")
        self._forward = layer.module.forward
        self.trace, self._number = traced_by(live.hooks, self)

    def mixing(self) -> Activation | None:
        """Return the activation in force for the running call, or None."""
        return None if self._live is None else self._live.current()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward, and add the update of the activation in force."""
        y = self._forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._traced(args[0] if args else next(iter(kwargs.values())), y)
        activation = _CURRENT.get()
        if activation is None or activation.live is not self._live or activation.closed:
            activation = self.mixing()
            if activation is None:
                return y
        x = args[0] if args else next(iter(kwargs.values()))
        return activation.plan.apply(self.layer, x, y, activation.lease, activation.usage)

    def _traced(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output with the update under torch.compile: by a hook's function, or mixed outside the graph."""
        if self._live is None:
            return y
        outside, learns = self._live.mixes_outside, torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if outside is not None and (learns or self.trace is None):
            return outside(self, x, y)
        return self.trace(self._number, x, y, self.layer.parameter("bias"))  # type: ignore[misc]

    def remove(self) -> None:
        """Give the layer its own forward back, unless another stand-in wraps this one, which then only calls it."""
        if not give_back(self.layer.module, "forward", self._own, self):
            self._live = None
