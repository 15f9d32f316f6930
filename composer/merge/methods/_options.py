"""Checks of options that several methods have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loraweave.errors import WeightingError


def finite(value: float, name: str, *, method: str) -> float:
    """`value` when it is a finite number. WeightingError otherwise."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise WeightingError(f"{method}: {name}={value!r} is not a finite number")
    return float(value)


def choice(value: str, name: str, known: Sequence[str], *, method: str) -> None:
    """WeightingError when `value` is none of the known words."""
    if value not in known:
        raise WeightingError(f"{method}: {name}={value!r} is none of {', '.join(repr(word) for word in known)}")
