"""Checks of options that several methods have."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.common.checks import is_number
from loraweave.errors import WeightingError


def finite(value: float, name: str, *, method: str) -> float:
    """`value`, if it is a finite number. Raises WeightingError otherwise."""
    if not is_number(value):
        raise WeightingError(f"{method}: {name}={value!r} is not a finite number")
    return float(value)


def choice(value: str, name: str, known: Sequence[str], *, method: str) -> None:
    """Raises WeightingError unless `value` is one of the known words."""
    if value not in known:
        raise WeightingError(f"{method}: {name}={value!r} is none of {', '.join(repr(word) for word in known)}")
