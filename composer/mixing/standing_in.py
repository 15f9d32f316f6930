"""Attributes of a model's modules that something stands in for, and that they get back."""

from __future__ import annotations

from typing import Any

from torch import nn


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
