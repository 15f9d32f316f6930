"""Stand-ins for attributes of a model's modules, their removal, and claims of modules by owners that may change them.

`watch` is for layers that their owner may not call: without an error, their update would be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraweave.common.process import lock_of
from loraweave.errors import AlreadyActive, CompositionError
from loraweave.routers.tokens._call import BlockInput, has_two_sequences, prompted, running


class Handle(Protocol):
    """A change that an activation makes to a model, and that `remove` undoes."""

    def remove(self) -> None: ...


class Claims:
    """The owners of modules, such as a Composer's live layers; only the owner may change a module's output."""

    def __init__(self) -> None:
        self._lock = lock_of(self)
        self._owners: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

    def take(self, owner: object, modules: Iterable[nn.Module]) -> None:
        """Claim the modules for one owner. Raises AlreadyActive, having claimed none, if another owner has one."""
        modules = list(modules)
        with self._lock:
            if any(self._owners.get(module, owner) is not owner for module in modules):
                raise AlreadyActive(
                    "another Composer is active on this model, or has fused into it; leave that one first, or use one "
                    "Composer with a pool of all adapters"
                )
            for module in modules:
                self._owners[module] = owner

    def give_back(self, owner: object, modules: Iterable[nn.Module]) -> None:
        """Release those of these modules that `owner` has claimed."""
        with self._lock:
            for module in modules:
                if self._owners.get(module) is owner:
                    del self._owners[module]


CLAIMS = Claims()


@contextmanager
def claimed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Claim the modules for the block, in which no Composer may be active on them. Raises AlreadyActive if one is."""
    owner, held = object(), list(modules)
    CLAIMS.take(owner, held)
    try:
        yield
    finally:
        CLAIMS.give_back(owner, held)


# the dictionaries of a module's hooks, each with the other dictionaries that have the same keys
_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
_STATE = "__getstate__"


class StandIn:
    """An object placed in a module while a mixture is active: a hook, or an object whose method replaces an attribute.

    Copies and pickles of the module made meanwhile do not have it (`CleanCopies`).
    """

    # the module's own value of the replaced attribute; None if the class's applies
    _own: Any = None

    def own(self, name: str) -> Any:
        """Return the module's own attribute of this name; None if the class's applies."""
        return self._own


class Hook(StandIn):
    """A hook of a module, which does nothing in a copied or unpickled one."""

    # for copy and pickle
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _inert_hook, ()


def _do_nothing(*given: Any) -> None:
    """Do nothing: the hook of a copied module."""


def _inert_hook() -> Callable[..., None]:
    return _do_nothing


@dataclass(eq=False)
class CleanCopies:
    """A guard from `install` to `remove`: a copy or pickle of the module is made without stand-ins and hooks."""

    _module: nn.Module

    def install(self) -> None:
        # unless another guard does it by now
        vars(self._module).setdefault(_STATE, self._without)

    def _without(self) -> Any:
        state_of: Callable[[nn.Module], Any] = type(self._module).__getstate__
        full_state = state_of(self._module)
        if not isinstance(full_state, dict):
            return full_state
        state = {name: value for name, value in full_state.items() if name != _STATE}
        for name in list(state):
            stand_in = getattr(value := state[name], "__self__", None)
            while isinstance(stand_in, StandIn):
                stand_in = getattr(value := stand_in.own(name), "__self__", None)
            state[name] = value
            # leave out a forward that `_OwnForward` has set to the class's
            if stand_in is self._module and name == "forward" and value == MethodType(type(stand_in).forward, stand_in):
                value = None
            if value is None and full_state[name] is not None:
                del state[name]
        for name, beside in _HOOKS.items():
            ours = {key for key, hook in state.get(name, {}).items() if isinstance(hook, StandIn)}
            for attribute in (name, *beside):
                if ours and attribute in state:
                    state[attribute] = type(state[attribute])(
                        (key, hook) for key, hook in state[attribute].items() if key not in ours
                    )
        return state

    def remove(self) -> None:
        give_back(self._module, _STATE, None, self)


def give_back(module: nn.Module, name: str, own: Any, stand_in: object) -> bool:
    """Restore a module's `own` attribute (None: the class's); return False if another than `stand_in` is there now."""
    if getattr(vars(module).get(name), "__self__", None) is not stand_in:
        return False
    if own is None:
        del vars(module)[name]
    else:
        vars(module)[name] = own
    return True


# the attribute with transformers' function that runs a block without keeping its activations
CHECKPOINT = "_gradient_checkpointing_func"


class WatchedBlock(StandIn):
    """A stand-in for a block's `forward` that publishes the block's input, also when checkpointing runs the block again."""

    def __init__(self, path: str, block: nn.Module) -> None:
        self.path = path
        self._block = block
        self._tells = True
        self._own = {name: vars(block).get(name) for name in ("forward", CHECKPOINT)}
        self._forward = block.forward
        block.forward = self.run  # type: ignore[method-assign]
        if self._own[CHECKPOINT] is not None:
            vars(block)[CHECKPOINT] = self.checkpoint

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's forward, and let `running_block` find the block's input meanwhile."""
        with self._running(args, kwargs):
            return self._forward(*args, **kwargs)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run the block's checkpointing, which calls the function now and in the backward pass."""
        checkpointing: Any = self._own[CHECKPOINT]
        return checkpointing(partial(self._again, function), *args)

    def _again(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._running(args, getattr(function, "keywords", {})):
            return function(*args)

    def _running(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        x_BTI = kwargs.get("hidden_states", tensors[0] if tensors else None)
        # in code made by torch.compile layers find no input, and say so
        if not self._tells or torch.compiler.is_compiling() or not isinstance(x_BTI, Tensor) or x_BTI.ndim != 3:
            return nullcontext()
        beside = frozenset(tensor.data_ptr() for tensor in tensors if tensor is not x_BTI)
        return running(BlockInput(self.path, x_BTI, beside))

    def own(self, name: str) -> Any:
        return self._own[name]

    def remove(self) -> None:
        """Restore the block's own attributes, unless another stand-in wraps this one, which then only calls them."""
        self._tells = False
        for name, original in self._own.items():
            give_back(self._block, name, original, self)


class PromptedGenerate(StandIn):
    """A stand-in for `generate` that publishes the prompts, since calls of a token each cannot tell prompt from answer.

    `begin` shows an encoder-decoder's router the prompts: the encoder runs before the model's own first call.
    """

    def __init__(self, model: nn.Module, begin: Callable[[dict[str, Any]], None]) -> None:
        self._model = model
        self._begin = begin
        self._own = vars(model).get("generate")
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        vars(model)["generate"] = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's generate, and let `current_prompts` return its prompts meanwhile."""
        ids_BT = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2 or ids_BT.is_floating_point():
            return self._generate(*args, **kwargs)
        mask_BT = kwargs.get("attention_mask")
        mask_BT = mask_BT if isinstance(mask_BT, Tensor) else self._inferred(ids_BT, kwargs)
        with prompted(ids_BT, mask_BT):
            if has_two_sequences(self._model):
                self._begin({"input_ids": ids_BT, "attention_mask": mask_BT})
            return self._generate(*args, **kwargs)

    def _inferred(self, ids_BT: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the mask that `generate` makes if the caller passes none.

        It is 0 for the padding token, unless that token also ends sequences.
        """
        config = kwargs.get("generation_config") or getattr(self._model, "generation_config", None)
        pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
        end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
        if pad is None or pad in (end if isinstance(end, list | tuple) else [end]):
            return torch.ones_like(ids_BT)
        return ids_BT.ne(int(pad)).long()

    def remove(self) -> None:
        """Restore the model's own `generate`."""
        give_back(self._model, "generate", self._own, self)


def watch(
    name: str, module: nn.Module, owner: nn.Module, expected: Callable[[], bool]
) -> list[RemovableHandle | _OwnForward]:
    """Return handles of hooks that raise CompositionError if `owner` ran without calling `module` while `expected()`.

    `name` is the layer's path for messages.
    """
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

    # `expected` must be asked when the code runs, not when it is traced
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
    """A flag: True if traced code calls the layer. One thread traces at a time, and a thread-local would break the graph."""

    called = True


class _OwnForward:
    """A copy of the class's `forward` on one module until `remove`, which makes torch.compile compile again with hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward = None if "forward" in vars(module) else MethodType(type(module).forward, module)
        if self._forward is not None:
            module.forward = self._forward

    def remove(self) -> None:
        if self._forward is not None and vars(self._module).get("forward") is self._forward:
            del self._module.forward


class Step(Hook):
    """A hook of a module that calls `step()` and changes no input and no output."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self, *given: Any) -> None:
        self._step()


def in_backward_thread() -> bool:
    """Return True in a thread of autograd that runs a backward pass."""
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)
