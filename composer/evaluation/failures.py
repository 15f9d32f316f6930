"""What became of candidates that could not be scored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Failures:
    """How many candidates could not be scored, and why the first one could not."""

    count: int = 0
    first: str = ""

    def add(self, why: Exception | str) -> None:
        """Notes one more."""
        self.count += 1
        self.first = self.first or (f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why)
