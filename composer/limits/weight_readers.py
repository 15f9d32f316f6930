"""Layers that are not called, or not always: their owner reads the weight and computes with it itself.

A hook on such a layer never fires, and an update would be lost without a word. How a class uses its layers is seen
from the bytecode of its methods, which is there without the source and quick to look through.
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
_KNOWN: WeakKeyDictionary[type[nn.Module], tuple[set[str], set[str]]] = WeakKeyDictionary()


def use_of(owner: nn.Module, attribute: str) -> Use:
    """Whether the owner's forward, and what it leads to, calls `self.<attribute>`, computes with its weight, or does both.

    "called" also where neither is seen: others may call the layer.
    """
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
    for code in _reachable(owner):
        for attribute, read in _loads(code):
            (reads if read else others).add(attribute)
    _KNOWN[owner] = reads, others
    return reads, others


def _reachable(owner: type[nn.Module]) -> list[CodeType]:
    """The code of forward and of all methods that are named in it, in those, and so on: not what only makes or saves."""
    names, seen, found = ["forward"], {"forward"}, []
    while names:
        function = inspect.unwrap(getattr(owner, names.pop(), None))  # type: ignore[arg-type]
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            found.append(code)
            more = {name for name in _names(code) if name not in seen and hasattr(owner, name)}
            seen |= more
            names.extend(sorted(more))
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


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
