"""What was measured, on disk: answers item by item, sections of figures, and TABLES.md, which is made of both.

A file of data/figures is a section: its title, its place, when it was recorded, and blocks in their order. A block is a
`heading`, a `text`, a `command`, an `output`, a `table` of columns and rows, or the name of a table `computed` from answers.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._run import ROOT, Run, Table

DATA = ROOT / "benchmarks" / "data"
FIGURES = DATA / "figures"
PAGE = ROOT / "benchmarks" / "TABLES.md"
HEAD = """# Tables

Every figure that was measured, by section; [RESULTS.md](RESULTS.md) is the page to read first. `python -m benchmarks tables`
writes this page from `benchmarks/data`: change the data, not the page.
"""
# modules whose `tables()` gives, by name, the tables that are computed from answers
COMPUTED = ("_unseen_report", "routers", "_expert_kinds")
# ways that depend neither on the examples nor on the seed are kept once a task, under these
NO_SHOTS, NO_SEED = 0, 0
COLUMNS = ("task", "way", "shots", "seed", "count", "right", "loss", "seconds", "cpu_seconds", "notes")


def page() -> str:
    """The whole page."""
    files = sorted(FIGURES.glob("*.json"), key=lambda path: json.loads(path.read_text(encoding="utf-8"))["place"])
    computed = {name: table for module in COMPUTED for name, table in _tables(module).items()}
    return "\n".join([HEAD, *(section(json.loads(path.read_text(encoding="utf-8")), computed) for path in files)])


def _tables(module: str) -> dict[str, Table]:
    found: dict[str, Table] = import_module(f"benchmarks.{module}").tables()
    return found


def section(found: Mapping[str, Any], computed: Mapping[str, Table]) -> str:
    """One section in Markdown, with the commit that its figures came with, where one did not measure for it."""
    parts = [f"## {found['title']}\n"]
    if "recorded" in found:
        parts.append("Recorded {date} in commit {commit}.\n".format(**found["recorded"]))
    for block in found["blocks"]:
        ((kind, value),) = block.items()
        parts.append(f"{WRITERS[kind](value) if kind != 'computed' else computed[value].markdown()}\n")
    return "\n".join(parts)


def _table(value: Mapping[str, Any]) -> str:
    return Table("", tuple(value["columns"]), [tuple(row) for row in value["rows"]]).markdown()


WRITERS: dict[str, Callable[[Any], str]] = {
    "heading": lambda text: f"### {text}",
    "text": str,
    "command": lambda lines: "\n".join(f"    {line}" for line in lines),
    "output": lambda text: f"```\n{text}\n```",
    "table": _table,
}


def append(name: str, arguments: Sequence[str], tables: Sequence[Table]) -> Path:
    """Adds what a run has shown to the section of that name, with its command, machine, date and commit."""
    path = FIGURES / f"{name}.json"
    places = [json.loads(other.read_text(encoding="utf-8"))["place"] for other in FIGURES.glob("*.json")]
    new: dict[str, Any] = {"title": name, "place": max(places, default=0) + 1, "blocks": []}
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else new
    found["blocks"] += [{"command": [f"python -m benchmarks {' '.join(arguments)}"]}, {"text": _where()}]
    for table in tables:
        found["blocks"] += [{"text": table.title}, {"table": {"columns": table.columns, "rows": table.rows}}]
    write(path, found)
    return path


def write(path: Path, found: Mapping[str, Any]) -> None:
    """A block is a line, and so is a row of a table: a changed figure is one line in the difference of two versions."""
    head = {key: value for key, value in found.items() if key != "blocks"}
    blocks = ",\n".join(_block(block) for block in found["blocks"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{_json(head)[:-1]}, "blocks": [\n{blocks}\n]}}\n', encoding="utf-8")


def _block(block: Mapping[str, Any]) -> str:
    if "table" not in block:
        return _json(block)
    rows = ",\n".join(f" {_json(row)}" for row in block["table"]["rows"])
    return f'{{"table": {{"columns": {_json(block["table"]["columns"])}, "rows": [\n{rows}\n]}}}}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _where() -> str:
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = ", ".join(f"{name} {import_module(name).__version__}" for name in ("torch", "transformers", "peft"))
    python = ".".join(map(str, sys.version_info[:2]))
    today = datetime.now(UTC).date().isoformat()
    return f"{today}, commit {commit.stdout.strip() or 'unknown'}, {_processor()}, Python {python}, {versions}."


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


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
