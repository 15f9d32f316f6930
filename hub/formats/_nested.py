"""Finding the one adapter in a folder of folders: `checkpoint-500/`, `final/`, or one folder per adapter name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from loraweave.errors import AdapterUnsupported

MAX_DEPTH = 3
MAX_ENTRIES = 10_000
MAX_LISTED = 12


def adapter_folder(folder: Path, is_adapter: Callable[[Path], bool]) -> Path:
    """`folder` where it holds an adapter itself, else the one folder below it that does, else `folder` as it is.

    Links and hidden folders are not entered. Raises AdapterUnsupported, listing them, where several folders below it hold
    adapters: which one is meant is not said anywhere.
    """
    if not folder.is_dir() or is_adapter(folder):
        return folder
    found = [path for path in _folders_below(folder) if is_adapter(path)]
    if len(found) > 1:
        names = [path.relative_to(folder).as_posix() for path in found]
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise AdapterUnsupported(
            f"{folder}: {len(names)} folders in it hold adapters, and none stands above the others: "
            f"{', '.join(names[:MAX_LISTED])}{more}; give the path of one, for instance {str(found[-1])!r}"
        )
    return found[0] if found else folder


def _folders_below(folder: Path) -> Iterator[Path]:
    """The folders below, in order of their names, a folder before what it holds."""
    seen = 0
    waiting = [(folder, 0)]
    while waiting:
        here, depth = waiting.pop()
        if depth:
            yield here
        if depth == MAX_DEPTH:
            continue
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue
        seen += len(entries)
        if seen > MAX_ENTRIES:
            raise AdapterUnsupported(
                f"{folder}: no adapter in it, and below it more than {MAX_ENTRIES} files; give the adapter's own folder"
            )
        below = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")]
        waiting += [(Path(entry.path), depth + 1) for entry in reversed(below)]
