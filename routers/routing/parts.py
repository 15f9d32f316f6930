"""What a router is made of."""

from __future__ import annotations

from typing import Any


def parts_of(router: Any) -> list[Any]:
    """A router and those that it is made of."""
    return list(getattr(router, "parts", [router]))
