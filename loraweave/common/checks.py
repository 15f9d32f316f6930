"""Checks of counts and numbers."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TypeGuard

from loraweave.errors import LoraweaveError


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is an int of at least `least`; True and False do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> TypeGuard[float]:
    """Whether a value is a finite real number in [least, most], of numpy too; True and False do not count as numbers."""
    if isinstance(value, int):
        return not isinstance(value, bool) and least <= value <= most
    return isinstance(value, Real) and least <= float(value) <= most


def require_whole(name: str, value: object, least: int, error: type[LoraweaveError]) -> None:
    """Raises `error`, with the name and the value, unless the value is a whole number of at least `least`."""
    if not is_whole(value, least):
        raise error(f"{name} is {value!r}; it must be a whole number of at least {least}")
