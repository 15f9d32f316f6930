"""What was answered, item by item: a file for each measurement as it is made, and all of them together in data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._run import ROOT, Run, Table

DATA = ROOT / "benchmarks" / "data"
# ways that depend neither on the examples nor on the seed are kept once a task, under these
NO_SHOTS, NO_SEED = 0, 0
COLUMNS = ("task", "way", "shots", "seed", "count", "right", "loss", "seconds", "cpu_seconds", "notes")


@dataclass(frozen=True)
class Key:
    """What was measured: `shots` examples drawn by `seed`."""

    task: str
    way: str
    shots: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """right_N: 1 for each test item that was answered right. `seconds` and `cpu_seconds` (of the process): to choose."""

    key: Key
    right_N: np.ndarray
    loss: float
    seconds: float
    cpu_seconds: float
    notes: Mapping[str, Any]

    def row(self) -> list[Any]:
        """The measurement as COLUMNS name it; the items as the hexadecimal digits of their bits."""
        key, bits = self.key, np.packbits(self.right_N.astype(np.uint8)).tobytes().hex()
        figures = [len(self.right_N), bits, round(self.loss, 4), round(self.seconds, 2), round(self.cpu_seconds, 2)]
        return [key.task, key.way, key.shots, key.seed, *figures, dict(self.notes)]

    @classmethod
    def of(cls, row: list[Any]) -> Measured:
        task, way, shots, seed, count, bits, loss, seconds, cpu_seconds, notes = row
        right_N = np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))[:count]
        return cls(Key(task, way, shots, seed), right_N, loss, seconds, cpu_seconds, notes)


class Store:
    """All that is known: what `folder` holds, and below it what the file `earlier` brought, by key."""

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self.folder = folder
        self.earlier = earlier

    def all(self) -> dict[Key, Measured]:
        rows = json.loads(self.earlier.read_text())["rows"] if self.earlier and self.earlier.is_file() else []
        rows += [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        measured = (Measured.of(row) for row in rows)
        return {found.key: found for found in measured}

    def keep(self, found: Measured) -> None:
        key = found.key
        _write(self.folder / f"{key.task}-{key.way}-{key.shots}-{key.seed}.json", found.row())

    def close(self, run: Run, tables: Callable[[Mapping[Key, Measured]], Sequence[Table]]) -> None:
        """Shows the tables of all that is known; with --save all of it goes into the file, which TABLES.md sums up."""
        run.show(*tables(self.all()))
        if run.save and self.earlier:
            write_together(self.all().values(), self.earlier)
            run.shown.clear()


def write_together(measured: Iterable[Measured], path: Path) -> None:
    """One file with a line for each measurement, in a fixed order."""
    rows = sorted((found.row() for found in measured), key=lambda row: row[:4])
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.write_text(f'{{"columns": {json.dumps(COLUMNS)}, "rows": [\n{lines}\n]}}\n')


def answers(name: str) -> dict[Key, Measured]:
    """What data/NAME.json holds."""
    return Store(DATA / "none", DATA / f"{name}.json").all()


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the JSON file holds; it is made first where it is not there."""
    if not path.is_file():
        _write(path, make())
    return json.loads(path.read_text())


def known(folder: Path, pattern: str) -> list[Any]:
    """What the folder's JSON files of such names hold."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def _write(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
