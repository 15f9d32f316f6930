"""Files that are whole or not there: written beside their place, synced, renamed. Every room that saves one writes so."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from loraweave.errors import HubError, LoraweaveError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path in the folder of `target` to write to. The file takes the place of `target`, for good, when the block ends.

    Whoever reads `target` sees what was there before or all that was written. After an error nothing else is left. Raises
    OSError where the file system fails, also for a folder that does not exist.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        remove_file(temporary)
        raise
    sync(target.parent)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet, readable by its owner alone until it is complete, and then by all."""
    # exclusive: the name cannot be guessed, and a planted file is not followed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, 0o444)
    finally:
        os.close(descriptor)


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
