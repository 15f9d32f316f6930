"""A folder written whole: beside its place first, then renamed, so that nothing half-written is ever seen there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraweave.hub.stores.errors import storage_errors


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
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
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
