"""Atomic files: written beside their target, synced, renamed. Every room saves files this way."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path

from loraweave.common.process import holding
from loraweave.errors import HubError, LoraweaveError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to; the file durably replaces `target` when the block ends.

    Readers of `target` see the old file or the complete new one. An error leaves nothing else behind. Raises OSError if the
    file system fails, also for a folder that does not exist.
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
    """Writes a new file, readable by its owner alone until it is complete, and by all afterwards."""
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
    """The only folder outside the environment that loraweave writes to: $LORAWEAVE_CACHE, else ~/.cache/loraweave."""
    own = os.environ.get("LORAWEAVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraweave"


def as_path(value: object, what: str, error: type[LoraweaveError] = HubError) -> Path:
    """The value as a path. Raises `error`, which names `what` was expected, unless it is a text or a path."""
    if not isinstance(value, str | PathLike):
        raise error(f"{what} is {value!r:.80}; give its path")
    return Path(value)


_syncing = ContextVar("_syncing", default=True)


def unsynced() -> AbstractContextManager[None]:
    """Inside it this thread's `sync` does nothing: for what is synced later, or made again when it is missing."""
    return holding(_syncing, False)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power failure."""
    if not _syncing.get():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Removes a temporary file if possible."""
    try:
        os.unlink(path)
    except OSError:
        # the original error is the one to report; the next opening sweeps the file
        return
