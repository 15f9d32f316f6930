"""What counts as a number of things."""

from __future__ import annotations

from typing import TypeGuard


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is an int of at least `least`; True and False, which Python takes for 1 and 0, are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
