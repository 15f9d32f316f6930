"""Checks of counts, numbers and texts, of lists of them, and of the entries of untrusted JSON."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from types import UnionType
from typing import Any, TypeGuard, TypeVar

from loraweave.errors import LoraweaveError

T = TypeVar("T")


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Return True if a value is an int of at least `least`; True and False do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> TypeGuard[float]:
    """Return True if a value is a finite real number in [least, most], of numpy too; True and False are not numbers."""
    match value:
        case bool():
            return False
        case int():
            return least <= value <= most
        case Real():
            return least <= float(value) <= most
    return False


def is_list(value: object, of: type | UnionType = object) -> TypeGuard[Sequence[Any]]:
    """Return True if a value is a list, a tuple or another sequence, not a text, whose elements are all of type `of`."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(isinstance(item, of) for item in value)


def is_collection(value: object) -> TypeGuard[Collection[Any]]:
    """Return True if a value holds elements in any order, such as a list, a set or a view, and is not a text."""
    return isinstance(value, Collection) and not isinstance(value, str | bytes)


def require_whole(name: str, value: object, least: int, error: type[LoraweaveError]) -> None:
    """Raise `error`, with the name and the value, unless the value is a whole number of at least `least`."""
    if not is_whole(value, least):
        raise error(f"{name} is {value!r}; it must be a whole number of at least {least}")


def one_or_many(values: Iterable[str] | str | None) -> tuple[str, ...]:
    """Return the texts as a tuple: (values,) for a single text, () for None."""
    if values is None:
        return ()
    return (values,) if isinstance(values, str) else tuple(values)


def are_texts(values: Iterable[object]) -> TypeGuard[Iterable[str]]:
    """Return True if all values are texts."""
    return all(isinstance(value, str) for value in values)


def entry(table: object, name: str, kind: type[T] | tuple[type[T], ...]) -> T | None:
    """Return the value under a name in untrusted JSON, or None if it is missing or of another type."""
    value = table.get(name) if isinstance(table, Mapping) else None
    return value if isinstance(value, kind) else None


def says_something(text: object) -> TypeGuard[str]:
    """Return True if a value is a text with a visible character."""
    return isinstance(text, str) and bool(text.strip())
