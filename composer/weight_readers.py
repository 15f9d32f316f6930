"""Layers that are not called, or not always: their owner reads the weight and computes with it itself.

A hook on such a layer never fires, and an update would be lost without a word. How the methods of a class use their layers
is seen from their bytecode, which is there without the source and quick to look through.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

Use = Literal["called", "read", "both"]

# what one may ask a weight about without computing with it
_ABOUT = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "is_meta", "requires_grad", "numel", "element_size"})
# methods that make, tie or keep a weight, by a part of their names
_MAKING = ("init", "reset", "tie", "weight_norm", "resize", "load", "save", "prune", "get_", "set_")

_KNOWN: WeakKeyDictionary[type[nn.Module], tuple[set[str], set[str]]] = WeakKeyDictionary()


def use_of(owner: nn.Module, attribute: str) -> Use:
    """Whether the owner's methods call `self.<attribute>`, compute with its weight, or do both; "called" where unclear."""
    reads, others = _uses(type(owner))
    if attribute not in reads:
        return "called"
    return "both" if attribute in others else "read"


def _uses(owner: type[nn.Module]) -> tuple[set[str], set[str]]:
    """The attributes whose weights are read, and those that are looked at in any other way."""
    if owner in _KNOWN:
        return _KNOWN[owner]
    reads: set[str] = set()
    others: set[str] = set()
    for cls in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, member in vars(cls).items():
            function = inspect.unwrap(member) if callable(member) else member
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and not any(part in name for part in _MAKING):
                for attribute, read in _loads(code):
                    (reads if read else others).add(attribute)
    _KNOWN[owner] = reads, others
    return reads, others


def _loads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """The attributes that are loaded there, and whether for a computation with their weight; questions are left out."""
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    for place, (operation, attribute) in enumerate(steps):
        if not operation.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            continue
        part, then = (steps[place + ahead] if place + ahead < len(steps) else ("", None) for ahead in (1, 2))
        if not (part[0].startswith("LOAD_ATTR") and part[1] in ("weight", "bias")):
            yield str(attribute), False
            continue
        # in a call of isinstance, its name lies two steps before the attribute's
        asked = then[1] in _ABOUT or any(argument == "isinstance" for _, argument in steps[max(0, place - 2) : place])
        if part[1] == "weight" and not asked:
            yield str(attribute), True
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loads(constant)
