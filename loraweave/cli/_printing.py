"""The output of commands: tables and JSON on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from loraweave.cli._application import one_line
from loraweave.types import Record

if TYPE_CHECKING:
    from rich.table import Table

    from loraweave.hub.compositions import StoredComposition

# in a pipe a row is one line of any length, so that grep and cut work
PIPE_WIDTH = 10_000


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII for any terminal and locale; NaN and infinity become null."""
    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def print_table(table: Table) -> None:
    """Print a table with its texts as they are: a name like [bold] or :smile: is a name."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table; columns of numbers are right-aligned."""
    from loraweave.common.display import ShownTable

    print_table(ShownTable.of(columns, ([_cell(value) for value in row] for row in rows)))


def note(text: str) -> None:
    """Print a line on stderr, for the person at the terminal."""
    typer.echo(one_line(text), err=True)


def answer(as_json: bool, value: Any, *notes: str) -> None:
    """Print the value as JSON on stdout, or notes for a person."""
    if as_json:
        print_json(value)
        return
    for text in notes:
        note(text)


def progress_to_stderr() -> None:
    """Make the bars of long calls, which use rich's own console, leave stdout to the result."""
    import rich

    rich.reconfigure(stderr=True)


def record_row(record: Record) -> dict[str, Any]:
    """Return a record without its card, as JSON types."""
    names = "name hash base_model rank target_modules license tags description size_bytes created language version restored"
    shown = {name: plain(getattr(record, name)) for name in (*names.split(), "base_revision")}
    return {**shown, "source": record.source and vars(record.source), "parents": plain(record.parents)}


def composition_row(stored: StoredComposition) -> dict[str, Any]:
    """Return a composition of a hub as JSON types; `chosen` names the row that a search chose."""
    row = {"name": stored.name, "created": stored.created, "hash": stored.hash, "formula": stored.formula}
    return {**row, "chosen": (stored.report or {}).get("chosen"), "size_bytes": sum(stored.files.values())}


def plain(value: Any) -> Any:
    """Convert a value to JSON types."""
    match value:
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
        case None | str() | int():
            return value
    return str(value)


def _cell(value: object) -> object:
    return value if isinstance(value, int | float) else one_line(str(value))
