"""Files and folders that appear whole: written beside their target, synced, renamed. Every room saves this way."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from os import PathLike
from pathlib import Path

from loraweave.common.process import holding
from loraweave.common.storage_errors import storage_errors
from loraweave.errors import AdapterExists, HubError, LoraweaveError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; the file durably replaces `target` when the block ends.

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
    """Write a new file, readable by its owner alone until it is complete, and by all afterwards."""
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
    """Return the only folder outside the environment that is written to: $LORAWEAVE_CACHE, else ~/.cache/loraweave."""
    configured = os.environ.get("LORAWEAVE_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraweave"


def as_path(value: object, what: str, error: type[LoraweaveError] = HubError) -> Path:
    """Return the value as a path. Raises `error`, which names `what` was expected, unless it is a text or a path."""
    if not isinstance(value, str | PathLike):
        raise error(f"{what} is {value!r:.80}; give its path")
    return Path(value)


_syncing = ContextVar("_syncing", default=True)


def unsynced() -> AbstractContextManager[None]:
    """Disable this thread's `sync` inside the context: for files that are synced later, or made again if missing."""
    return holding(_syncing, False)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power failure."""
    if not _syncing.get():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a temporary file if possible."""
    try:
        os.unlink(path)
    except OSError:
        # the original error is the one to report; the next opening sweeps the file
        return


def require_replaceable(folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """Return the folder to replace: `folder`, or the target of a link. `is_own` says which entries of it may be lost.

    Raises AdapterExists for a file, and for a folder with anything else in it.
    """
    target = folder.resolve() if folder.is_symlink() else folder
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise AdapterExists(f"{target} is a file; give a folder that does not exist, is empty, or holds an adapter")
    foreign = sorted(entry.name for entry in target.iterdir() if not is_own(entry))
    if foreign:
        raise AdapterExists(
            f"{target} holds {len(foreign)} entries that are not part of an adapter ({', '.join(foreign[:3])}); "
            "replacing it would lose them, so give another folder"
        )
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, which takes the place of `target` when the block ends without an error.

    Its files are on the disk before that. What was at `target` comes back when the renaming fails, and is removed only
    afterwards; after an error everything is as it was. HubFull for a full disk, HubReadOnly where nothing can be written,
    HubError for another failure of the file system.
    """
    token = secrets.token_hex(8)
    new, old = target.parent / f".loraweave-{token}.tmp", target.parent / f".loraweave-{token}.old"
    try:
        with storage_errors(target, "writing a folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            yield new
            for path in new.rglob("*"):
                if path.is_file():
                    sync(path)
            replaces = target.exists()
            if replaces:
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if replaces:
                    old.rename(target)
                raise
            if replaces:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        with suppress(OSError):
            shutil.rmtree(new)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# by path, time, size and inode
_digests: dict[tuple[str, int, int, int], str] = {}
_digests_lock = threading.Lock()


def known_digest(path: Path, *, trust_cache: bool = True) -> str:
    """Return the sha256 of a file. An unchanged file is read once per process, unless `trust_cache` is off."""
    status = path.lstat()
    stamp = (str(path), status.st_mtime_ns, status.st_size, status.st_ino)
    with _digests_lock:
        known = _digests.get(stamp) if trust_cache else None
    if known is None:
        known = file_digest(path)
        with _digests_lock:
            _digests[stamp] = known
    return known
