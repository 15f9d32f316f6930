"""Files and folders: paths as they are given, what must last through a power failure, and the cache."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from loraweave.errors import HubError, LoraweaveError


def cache_folder() -> Path:
    """The one folder outside the environment that loraweave writes: $LORAWEAVE_CACHE, else ~/.cache/loraweave."""
    own = os.environ.get("LORAWEAVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraweave"


def as_path(value: object, what: str, error: type[LoraweaveError] = HubError) -> Path:
    """The path; raises `error`, which names `what` it was to be, for what is neither a text nor a path."""
    if not isinstance(value, str | PathLike):
        raise error(f"{what} is {value!r:.80}; give its path")
    return Path(value)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Removes a temporary file if it can be removed."""
    try:
        os.unlink(path)
    except OSError:
        # the error that brought us here is the one to tell; the next open sweeps the file
        return
