"""Writes a folder whole: next to its place first, then renamed, so that nobody sees a half-written one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraweave.common.files import sync
from loraweave.errors import AdapterExists
from loraweave.hub.stores.errors import storage_errors


def require_replaceable(folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """The folder to replace: `folder`, or where it leads to if it is a link. `is_own` says what may be lost of an old one.

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
    """An empty folder to write into, which takes the place of `target` when the block ends without an error.

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
            _swap(new, target, old)
    finally:
        with suppress(OSError):
            shutil.rmtree(new)


def _swap(new: Path, target: Path, old: Path) -> None:
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
