"""Whether the files of a folder stayed what they were while they were read."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraweave.errors import AdapterCorrupt, HubError
from loraweave.hub.formats._files import require_held

SUFFIXES = {".json", ".safetensors", ".md"}
NAMES = {"adapter_model.bin", "pytorch_lora_weights.bin", "model_weights.ckpt"}
# a file written so lately may be written again without another time: clocks of file systems have coarse steps
FRESH_S = 2.0

State = tuple[int, int, int, int, str]


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Raises AdapterCorrupt, naming the file, when one was replaced, rewritten, added or removed within the block.

    An error of the block that such a change explains is replaced by it. Files are compared by identity, size and time of
    writing, and those written within the last seconds by their hash too, so that older ones are not read twice.
    """
    fresh_ns = time.time_ns() - int(FRESH_S * 1e9)
    before = _states(folder, fresh_ns)
    try:
        yield
    except HubError as error:
        _compare(before, _states(folder, fresh_ns), folder, error)
        raise
    _compare(before, _states(folder, fresh_ns), folder, None)


def _compare(before: dict[str, State], after: dict[str, State], folder: Path, cause: object) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        name = changed[0]
        sizes = [f"{state[name][2]} bytes" if name in state else "absent" for state in (before, after)]
        raise AdapterCorrupt(
            f"{folder}: {name} changed while it was read ({sizes[0]} before, {sizes[1]} after); read the adapter again when "
            "nothing writes to the folder"
        ) from (cause if isinstance(cause, BaseException) else None)


def _states(folder: Path, fresh_ns: int) -> dict[str, State]:
    try:
        paths = [folder] if not folder.is_dir() else [path for path in folder.iterdir() if _counts(path.name)]
    except OSError:
        paths = []
    states: dict[str, State] = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            # a dangling link; whoever reads it says so
            continue
        fresh = status.st_mtime_ns >= fresh_ns and stat.S_ISREG(status.st_mode)
        digest = _digest(path) if fresh else ""
        states[path.name] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, digest)
    return states


def _digest(path: Path) -> str:
    try:
        # another kind of file may have taken the place meanwhile, and opening a FIFO would wait
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            require_held(descriptor, os.fstat(descriptor).st_size, str(path))
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, HubError):
        # whoever reads the file says so
        return ""


def _counts(name: str) -> bool:
    return name in NAMES or Path(name).suffix in SUFFIXES
