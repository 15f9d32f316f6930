"""Progress bars, figures and tables for people."""

from __future__ import annotations

import copy
import io
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from loraweave.errors import PackageMissing

PATIENCE_S = 1.0
# how a number or a time may stand in a text: 0.5, [80.1, +3%], 1e-05 or 2026-12-01T10:30:00Z
NUMBER = re.compile(r"[(\[]?[-+]?\.?\d[\d.,:TZ+-]*(e[-+]?\d+)?%?[)\],;:]*")
# the fewest characters of a column of texts, and of the first one, before the last column is left out
LEAST, LEAST_NAME = 8, 25

Item = TypeVar("Item")


def progress_bar(shown: bool | Progress, *, field: str = "") -> Progress:
    """Make a bar with the task's description, count and time left, and the text of the task's `field`, if given.

    A `Progress` is itself: whoever gives one shows it in a way of their own.
    """
    if isinstance(shown, Progress):
        return shown
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    texts = [TextColumn(f"{{task.fields[{field}]}}")] if field else []
    return Progress(*columns, *texts, disable=not shown)


def tracked(items: Iterable[Item], label: str, *, total: int | None, shown: bool = True) -> Iterator[Item]:
    """Yield the items one by one; a bar is on stderr from the first second on, if that is a terminal and `shown`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not (shown and sys.stderr.isatty()))
    task = bar.add_task(label, total=total)
    started, running = time.monotonic(), False
    try:
        for item in items:
            if not running and time.monotonic() - started > PATIENCE_S:
                bar.start()
                running = True
            yield item
            bar.advance(task)
    finally:
        if running:
            bar.stop()


def blank_figure(why: str, **settings: Any) -> Any:
    """Make a matplotlib Figure with these settings. Raises PackageMissing, which says `why`, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissing(f"{why}: pip install 'loraweave[plot]'") from error
    return Figure(**settings)


class ShownTable(Table):
    """A rich Table that a plain Python prompt prints as a table and a notebook shows as HTML that holds only text.

    However narrow the terminal is, no number and no word of a heading is broken: texts wrap first, then columns go, the last
    ones first, and a line below the table names them.
    """

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> ShownTable:
        """Make a table of these rows; columns of numbers are right-aligned, other values appear as text."""
        listed = [list(row) for row in rows]
        table = cls(title=title, title_justify="left")
        for position, column in enumerate(columns):
            number = bool(listed) and all(isinstance(row[position], int | float) for row in listed)
            table.add_column(column, justify="right" if number else "left")
        for row in listed:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from Table.__rich_console__(self._fitted(options.max_width), console, options)

    def _fitted(self, width: int) -> ShownTable:
        """Return a copy at most `width` characters wide: each column gets a width, and the last columns may be left out."""
        least = [_least_width(column, is_first=not at) for at, column in enumerate(self.columns)]

        def spare(kept: int) -> int:
            # a border and two blanks for each column, and one more border
            return width - sum(least[:kept]) - 3 * kept - 1

        kept = next((number for number in range(len(least), 2, -1) if spare(number) >= 0), min(2, len(least)))
        least[0] = max(1, least[0] + min(0, spare(kept)))
        columns = [copy.copy(column) for column in self.columns[:kept]]
        wanted = [max(0, _natural_width(column) - least[at]) for at, column in enumerate(columns)]
        left = max(0, spare(kept))
        # those that want little get it, and the others share the rest
        for served, at in enumerate(sorted(range(kept), key=wanted.__getitem__)):
            extra = min(wanted[at], left // (kept - served))
            left -= extra
            columns[at].width, columns[at].no_wrap, columns[at].overflow = least[at] + extra, False, "fold"
        fitted = copy.copy(self)
        fitted.columns = columns
        if gone := [str(column.header) for column in self.columns[kept:]]:
            fitted.caption, fitted.caption_justify = f"left out, for want of width: {', '.join(gone)}", "left"
        return fitted

    def __repr__(self) -> str:
        written = io.StringIO()
        width = shutil.get_terminal_size().columns
        # in a kernel rich would display the table, and write nothing to the file
        plain = Console(file=written, width=width, markup=False, emoji=False, color_system=None, force_jupyter=False)
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
    """Return the characters of the column's longest number and of its heading's longest word, and what a text keeps."""
    cells = [str(cell) for cell in column.cells]
    words = [word for cell in cells for word in cell.split() if NUMBER.fullmatch(word)]
    whole = [*(cells if column.justify == "right" else words), *str(column.header).split()]
    return max([min(_natural_width(column), LEAST_NAME if is_first else LEAST), *map(cell_len, whole)])


def _text(cell: object) -> str:
    return escape(str(cell))
