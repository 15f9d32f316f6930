"""Whether the files of a folder stayed what they were while they were read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraweave.errors import AdapterCorrupt, HubError

SUFFIXES = {".json", ".safetensors", ".md"}
NAMES = {"adapter_model.bin"}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Raises AdapterCorrupt, naming the file, when one was replaced, rewritten, added or removed within the block.

    An error of the block that such a change explains is replaced by it. Files are compared by identity, size and time of
    writing, so that no file is read twice.
    """
    before = _states(folder)
    try:
        yield
    except HubError as error:
        _compare(before, _states(folder), folder, error)
        raise
    _compare(before, _states(folder), folder, None)


def _compare(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]], folder: Path, cause: object) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        name = changed[0]
        sizes = [f"{state[name][2]} bytes" if name in state else "absent" for state in (before, after)]
        raise AdapterCorrupt(
            f"{folder}: {name} changed while it was read ({sizes[0]} before, {sizes[1]} after); read the adapter again when "
            "nothing writes to the folder"
        ) from (cause if isinstance(cause, BaseException) else None)


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        paths = [folder] if not folder.is_dir() else [path for path in folder.iterdir() if _counts(path.name)]
    except OSError:
        paths = []
    states: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            # a dangling link; whoever reads it says so
            continue
        states[path.name] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return states


def _counts(name: str) -> bool:
    return name in NAMES or Path(name).suffix in SUFFIXES
