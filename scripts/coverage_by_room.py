#!/usr/bin/env python3
"""Print the share of each room's lines that the last `scripts/check coverage` ran, and the files of which it ran little."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path

from coverage import Coverage
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LITTLE = 0.5


def lines_run() -> dict[str, tuple[int, int]]:
    """Return (lines run, lines that could run) by file below the repository; raise CoverageException without a recording."""
    measured = Coverage(config_file=ROOT / "pyproject.toml")
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        measured.json_report(outfile=os.fspath(report))
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    counts: dict[str, tuple[int, int]] = {}
    for name, file in files.items():
        # a room lies at the root and is linked into the package
        place = (ROOT / name).resolve().relative_to(ROOT).as_posix()
        run, known = counts.get(place, (0, 0))
        summary = file["summary"]
        counts[place] = (max(run, summary["covered_lines"]), max(known, summary["num_statements"]))
    return counts


def main() -> None:
    files = {name: count for name, count in lines_run().items() if count[1]}
    rooms: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, count in files.items():
        rooms["/".join(name.split("/")[:-1][:2])].append(count)
    table = Table("room", "files", "lines", "run", title="Lines run by the fast tests")
    for room, counts in sorted(rooms.items()):
        run, known = map(sum, zip(*counts, strict=True))
        table.add_row(room, str(len(counts)), str(known), f"{run / known:.0%}")
    run, known = map(sum, zip(*files.values(), strict=True))
    table.add_section()
    table.add_row("all", str(len(files)), str(known), f"{run / known:.0%}")
    console = Console()
    console.print(table)
    little = {name: run / known for name, (run, known) in files.items() if run < LITTLE * known}
    console.print(f"{len(little)} files of which less than {LITTLE:.0%} is run, least first:")
    for name, share in sorted(little.items(), key=lambda pair: pair[1]):
        console.print(f"  {share:4.0%}  {name}", highlight=False)


if __name__ == "__main__":
    main()
