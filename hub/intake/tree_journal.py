"""What became of every adapter of a folder tree, kept beside the hub, so that the next walk reads only what has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraweave.hub.stores.storage_errors import storage_errors

# lines of one adapter; longer ones come from a damaged journal
_MAX_LINE_BYTES = 100_000


@dataclass(frozen=True)
class Noted:
    """An adapter's path in the tree, the stamp of its files then, and what became of it."""

    path: str
    stamp: str
    state: str
    name: str
    hash: str = ""
    why: str = ""


class TreeJournal:
    """The lines of one tree, the last of a path counts. It spares time only: without it everything is read again."""

    def __init__(self, hub_folder: Path, root: Path) -> None:
        key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.path = hub_folder / "trees" / f"{key}.jsonl"

    def read(self) -> dict[str, Noted]:
        """What was noted, by path; a line that cannot be read, such as the last of a killed process, is passed over."""
        found: dict[str, Noted] = {}
        with storage_errors(self.path, "reading what was added of the tree"):
            for line in self._lines():
                try:
                    fields = json.loads(line)
                    noted = Noted(**{key: str(value) for key, value in fields.items()})
                except (ValueError, TypeError, AttributeError):
                    continue
                found[noted.path] = noted
        return found

    def write(self, noted: Noted) -> None:
        """Adds a line; it reaches the disk when the system likes, since losing it costs a reading and no more."""
        with storage_errors(self.path, "noting what was added of the tree"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({key: value for key, value in vars(noted).items() if value}) + "\n"
            with self.path.open("a", encoding="ascii") as file:
                file.write(line)

    def _lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                yield line


def stamp(source: Path, options: Mapping[str, Any]) -> str:
    """Changes with names, sizes and times of a source's own files, with the options, and with the version of loraweave."""
    seen: list[tuple[str, int, int]] = []
    entries = [source] if source.is_file() else sorted(source.iterdir())
    for entry in entries:
        status = entry.stat() if entry.exists() else entry.lstat()
        if not entry.is_dir():
            seen.append((entry.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr((version("loraweave"), sorted(options.items()), seen)).encode()).hexdigest()[:32]
