"""What counts as a path."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from loraweave.errors import HubError, LoraweaveError


def as_path(value: object, what: str, error: type[LoraweaveError] = HubError) -> Path:
    """The path; raises `error`, which names `what` it was to be, for what is neither a text nor a path."""
    if not isinstance(value, str | PathLike):
        raise error(f"{what} is {value!r:.80}; give its path")
    return Path(value)
