"""What every measurement shares: what it was asked for, where its rows and adapters lie, and the tables that it shows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

import loraweave as lw
from benchmarks._control import CONTROLS
from loraweave.extensions.tour import read_rows
from loraweave.hub.sources import adapter_folders
from loraweave.retrieval.fusion import wilson

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 2000

console = Console(width=110, soft_wrap=True, highlight=False)


@dataclass
class Table:
    """Cells of text under headings, in Markdown; `title` stands above."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def without_empty(self) -> Table:
        """Without columns in which no cell has anything."""
        kept = [n for n in range(len(self.columns)) if any(row[n] for row in self.rows)]
        rows = [tuple(row[n] for n in kept) for row in self.rows]
        return Table(self.title, tuple(self.columns[n] for n in kept), rows)

    def markdown(self) -> str:
        first, *others = (f"| {' | '.join(line)} |" for line in (self.columns, *self.rows))
        return "\n".join([first, f"|{'---|' * len(self.columns)}", *others])


@dataclass
class Run:
    """One call of `python -m benchmarks`; what was not asked for is None, and each measurement has its own default."""

    rounds: int | None = None
    seconds: float | None = None
    threads: int = 1
    cpu: bool = False
    seed: int = 0
    data: Path = ROOT / "examples" / "data"
    pool: Path = ROOT / "examples" / "pool"
    out: Path | None = None
    report: bool = False
    save: str | None = None
    shown: list[Table] = field(default_factory=list)

    def show(self, *tables: Table) -> None:
        """Prints the tables, and keeps them for --save."""
        for table in tables:
            console.print(table.title, markup=False)
            console.print(f"{table.markdown()}\n", markup=False)
        self.shown += tables

    def folder(self) -> Path:
        """--out, which a run that keeps what it has measured needs: an interrupted one goes on from there."""
        if self.out is None:
            raise typer.BadParameter("this keeps what it measures: say in which folder with --out, before the name")
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out

    def entries(self, group: str | None = None, *, there: bool = True) -> dict[str, dict[str, Any]]:
        """The manifest's tasks, or those of one group; with `there` only those whose rows are in --data."""
        groups = json.loads((self.data / "MANIFEST.json").read_text(encoding="utf-8"))["groups"]
        chosen = groups.values() if group is None else [groups[group]]
        return {
            entry["task"]: entry for part in chosen for entry in part if not there or (self.data / entry["file"]).is_file()
        }

    def rows(self, task: str) -> list[dict[str, Any]]:
        """The rows of a task of the manifest."""
        return read_rows(self.data / self.entries()[task]["file"])

    def adapters(self) -> list[Path]:
        """The adapters' folders in --pool."""
        return adapter_folders(self.pool)

    @contextmanager
    def hub(
        self, without: Collection[str] = (), *others: Path, control: str | None = None, seed: int = 0
    ) -> Iterator[lw.Hub]:
        """A hub of all of them but those named, and of others, which is deleted at the end.

        With a `control`, the former are replaced as the function of that name in `_control` does it.
        """
        kept = [path for path in self.adapters() if path.name not in without]
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub:
            if control is not None:
                CONTROLS[control](kept, Path(made), seed)
                kept = [Path(made) / path.name for path in kept]
            for path in kept:
                hub.add(path)
            for path in others:
                hub.add(path, name="in_context")
            yield hub


def pairs(rows: list[dict[str, Any]], split: str) -> list[tuple[str, str]]:
    """Inputs and targets of the rows of one split."""
    return [(row["input"], row["target"]) for row in rows if row["split"] == split]


def interval(
    draws_R: np.ndarray, digits: int = 2, unit: Callable[[float], str] | None = None, *, share_of: int | None = None
) -> str:
    """The first value, and 2.5 and 97.5 percentiles of the others, which were drawn and may be NaN: "0.40 [0.26, 0.54]".

    The limits of a share of right answers, of `share_of` items, are Wilson's, with the variance of the draws.
    """
    show = unit or (lambda value: f"{value:.{digits}f}")
    drawn_R = draws_R[1:]
    if share_of is None:
        low, high = np.percentile(drawn_R[~np.isnan(drawn_R)], [2.5, 97.5])
    else:
        low, high = wilson(float(draws_R[0]), share_of, drawn_R)
    return f"{show(draws_R[0])} [{show(low)}, {show(high)}]"


def best_of(run: Callable[[], object], timer: Callable[[], float], times: int) -> float:
    """The fewest seconds of that many runs."""
    taken = []
    for _ in range(times):
        before = timer()
        run()
        taken.append(timer() - before)
    return min(taken)


def status_bytes(field_name: str) -> int:
    """A figure of this process from /proc, such as VmRSS; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines: Mapping[str, str] = (
        dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    )
    return int(lines[field_name].split()[0]) * 1024 if field_name in lines else 0
