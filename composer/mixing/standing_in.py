"""Attributes of a model's modules that something stands in for, and that they get back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

# what a module has of hooks: each dictionary, and those beside it under the same keys
_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
_STATE = "__getstate__"


class StandIn:
    """What is in a module while a mixture is active: a hook, or something one of whose methods stands in for an attribute.

    A copy of the module that is made meanwhile, or a pickle, is without it (`CleanCopies`).
    """

    def own(self, name: str) -> Any:
        """What the module has under this name otherwise; None for its class's."""
        return None


class CleanCopies:
    """From `install` to `remove`, a copy or a pickle of the module has nothing that stands in, but what it has otherwise."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def install(self) -> None:
        # not where another one does it by now
        vars(self._module).setdefault(_STATE, self._without)

    def _without(self) -> Any:
        state_of: Callable[[nn.Module], Any] = type(self._module).__getstate__
        found = state_of(self._module)
        if not isinstance(found, dict):
            return found
        state = {name: value for name, value in found.items() if name != _STATE}
        for name in list(state):
            stand_in = getattr(value := state[name], "__self__", None)
            while isinstance(stand_in, StandIn):
                stand_in = getattr(value := stand_in.own(name), "__self__", None)
            state[name] = value
            # an own forward that is the class's stands there only to be seen
            if stand_in is self._module and name == "forward" and value == MethodType(type(stand_in).forward, stand_in):
                value = None
            if value is None and found[name] is not None:
                del state[name]
        for name, beside in _HOOKS.items():
            ours = {key for key, hook in state.get(name, {}).items() if isinstance(hook, StandIn)}
            for each in (name, *beside):
                if ours and each in state:
                    state[each] = type(state[each])((key, hook) for key, hook in state[each].items() if key not in ours)
        return state

    def remove(self) -> None:
        give_back(self._module, _STATE, None, self)


def give_back(module: nn.Module, name: str, own: Any, stand_in: object) -> bool:
    """The module has its `own` attribute again, or its class's where that is None, if the one it has is a bound method of
    `stand_in`. False, with nothing changed, where another stands in by now, which calls this one."""
    if getattr(vars(module).get(name), "__self__", None) is not stand_in:
        return False
    if own is None:
        del vars(module)[name]
    else:
        vars(module)[name] = own
    return True
