"""Whether options are of the types that a recipe's fields say."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a plain one, `tuple[x, ...]`, or a union of such.

    A `Literal` is any value of its members' type: which of them there are is for the recipe to say.
    """
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is Literal:
        return isinstance(value, type(get_args(kind)[0]))
    if kind is bool or not isinstance(value, bool):
        return isinstance(value, int | float if kind is float else kind)
    return False


def described(kind: Any) -> str:
    """The type in words, for an error."""
    if isinstance(kind, UnionType):
        return " or ".join(described(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each of which is {described(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return described(type(get_args(kind)[0]))
    return WORDS[kind]
