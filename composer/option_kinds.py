"""Whether the options given to a function are of the kinds that its signature says."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "None",
    Mapping: "a mapping of names to values",
}


def kinds_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotation of every parameter; none for a function whose annotations name what cannot be found."""
    try:
        return typing.get_type_hints(function)
    except NameError:
        return {}


def is_of_kind(value: object, kind: Any) -> bool:
    """Whether a value fits an annotation. Numbers are finite, True and False are none; all fits a kind unknown here."""
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_kind(value, each) for each in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(kind))
    if kind is int or kind is float:
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool) and _finite(value)
    plain = origin or kind
    return isinstance(value, plain) if plain in WORDS else True


def described(kind: Any) -> str:
    """What a value of that kind is, in words."""
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(each) for each in get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(repr(each) for each in get_args(kind))
    return WORDS.get(origin or kind, str(kind))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
