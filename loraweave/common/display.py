"""Progress bars, figures and tables for people."""

from __future__ import annotations

import copy
import io
import logging
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, TypeVar

from rich import get_console
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table

from loraweave.common.names import printable
from loraweave.errors import PackageMissing

PATIENCE_S = 1.0
# a number or a time inside a text, such as 0.5, [80.1, +3%], 1e-05 or 2026-12-01T10:30:00Z
NUMBER = re.compile(r"[(\[]?[-+]?\.?\d[\d.,:TZ+-]*(e[-+]?\d+)?%?[)\],;:]*")
# the least widths of a text column and of the first column, in characters; the last columns are left out to keep them
LEAST, LEAST_NAME = 8, 25

Item = TypeVar("Item")


class StageLines(Progress):
    """The progress bar of a pipe: a line on stderr for each description, unless the log `loraweave` leaves out warnings."""

    _last: str | None = None

    def add_task(self, description: str, *settings: Any, **fields: Any) -> TaskID:
        self._say(description)
        return super().add_task(description, *settings, **fields)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        self._say(changes.get("description"))
        super().update(task_id, **changes)

    def _say(self, description: str | None) -> None:
        if description and description != self._last and logging.getLogger("loraweave").isEnabledFor(logging.WARNING):
            self._last = description
            print(printable(description), file=sys.stderr, flush=True)


def progress_bar(shown: bool | Progress, *, field: str = "") -> Progress:
    """Make a rich bar with a task's description, count and time left, and the text of the task's `field`, if named.

    Where neither a terminal nor a notebook would show it, it is a `StageLines`. The bar is hidden if `shown` is False. A
    `Progress` passed as `shown` is returned as it is.
    """
    if isinstance(shown, Progress):
        return shown
    console = get_console()
    if shown and not (console.is_terminal or console.is_jupyter):
        return StageLines(disable=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, *([TextColumn(f"{{task.fields[{field}]}}")] if field else []), disable=not shown)


def tracked(items: Iterable[Item], label: str, *, total: int | None, shown: bool = True) -> Iterator[Item]:
    """Yield the items; show a progress bar on stderr after one second, if `shown` and if stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not (shown and sys.stderr.isatty())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=disable)
    task = bar.add_task(label, total=total)
    started = time.monotonic()
    try:
        for item in items:
            if time.monotonic() - started > PATIENCE_S:
                bar.start()
            yield item
            bar.advance(task)
    finally:
        if bar.live.is_started:
            bar.stop()


def blank_figure(why: str, **settings: Any) -> Any:
    """Make a matplotlib Figure with these arguments. Without matplotlib raises PackageMissing, which begins with `why`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissing(f"{why}: pip install 'loraweave[plot]'") from error
    return Figure(**settings)


class ShownTable(Table):
    """A rich Table that prints itself at a Python prompt and shows as escaped HTML in a notebook.

    Numbers and the words of headings are never broken. In a narrow terminal texts wrap first; then the last columns are left
    out, and a line below the table names them. In a pipe or a file the table has no borders.
    """

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> ShownTable:
        """Make a table from headings and rows; columns of numbers are right-aligned, and floats have four digits."""
        listed = [list(row) for row in rows]
        table = cls(title=title, title_justify="left")
        for position, column in enumerate(columns):
            number = bool(listed) and all(isinstance(row[position], int | float) for row in listed)
            table.add_column(column, justify="right" if number else "left")
        for row in listed:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitted = self._fitted(options.max_width, boxed=options.is_terminal)
        drawn: Iterable[Any] = Table.__rich_console__(fitted, console, options)
        if not options.is_terminal:
            title = textwrap.wrap(str(self.title or ""), options.max_width)
            lines = [*title, *"".join(segment.text for segment in drawn).splitlines()]
            drawn = [Segment(f"{line.rstrip()}\n") for line in lines]
        yield from drawn

    def _fitted(self, width: int, *, boxed: bool) -> ShownTable:
        """Return a copy at most `width` characters wide: each column gets a width, and the last columns may be left out."""
        least = [_least_width(column, is_first=not at) for at, column in enumerate(self.columns)]

        def spare(kept: int) -> int:
            # a border and two blanks for each column, and one more border; without a box two blanks between columns
            return width - sum(least[:kept]) - (3 * kept + 1 if boxed else 2 * (kept - 1))

        kept = next((number for number in range(len(least), 2, -1) if spare(number) >= 0), min(2, len(least)))
        least[0] = max(1, least[0] + min(0, spare(kept)))
        columns = [copy.copy(column) for column in self.columns[:kept]]
        wanted = [max(0, _natural_width(column) - least[at]) for at, column in enumerate(columns)]
        left = max(0, spare(kept))
        # columns that need little extra width get all of it, and the others share the rest
        for served, at in enumerate(sorted(range(kept), key=wanted.__getitem__)):
            extra = min(wanted[at], left // (kept - served))
            left -= extra
            columns[at].width, columns[at].no_wrap, columns[at].overflow = least[at] + extra, False, "fold"
        fitted = copy.copy(self)
        fitted.columns = columns
        if not boxed:
            fitted.box, fitted.padding, fitted.pad_edge, fitted.title = None, (0, 2, 0, 0), False, None
        if gone := [str(column.header) for column in self.columns[kept:]]:
            fitted.caption, fitted.caption_justify = f"left out, for want of width: {', '.join(gone)}", "left"
        return fitted

    def __repr__(self) -> str:
        written = io.StringIO()
        width = shutil.get_terminal_size().columns
        # in a notebook's kernel rich would display the table instead of writing it to the file
        settings: dict[str, Any] = {"force_terminal": True, "force_jupyter": False, "color_system": None}
        plain = Console(file=written, width=width, markup=False, emoji=False, **settings)
        plain.print(self, highlight=False)
        return written.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        aligned = [f' style="text-align:{column.justify}"' for column in self.columns]
        head = "".join(f"<th{style}>{_text(c.header)}</th>" for c, style in zip(self.columns, aligned, strict=True))
        body = "".join(
            f"<tr>{''.join(f'<td{style}>{_text(cell)}</td>' for cell, style in zip(row, aligned, strict=True))}</tr>"
            for row in zip(*(column.cells for column in self.columns), strict=True)
        )
        caption = f'<caption style="text-align:left">{_text(self.title)}</caption>' if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _repr_mimebundle_(self, include: Sequence[str], exclude: Sequence[str], **kwargs: Any) -> dict[str, str]:
        # rich's own would read names as markup
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


def _natural_width(column: Column) -> int:
    return max(cell_len(line) for text in (column.header, *column.cells) for line in str(text).split("\n"))


def _least_width(column: Column, *, is_first: bool) -> int:
    """Return a column's least width in characters: numbers and words of the heading stay whole, other texts may wrap."""
    words = [word for cell in column.cells for word in str(cell).split() if NUMBER.fullmatch(word)]
    whole = [*words, *str(column.header).split()]
    return max([min(_natural_width(column), LEAST_NAME if is_first else LEAST), *map(cell_len, whole)])


def _text(cell: object) -> str:
    return escape(str(cell))
