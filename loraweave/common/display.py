"""Progress bars, figures and tables for people."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loraweave.errors import PackageMissing

PATIENCE_S = 1.0

Item = TypeVar("Item")


def progress_bar(shown: bool | Progress, *, field: str = "") -> Progress:
    """A bar with the task's description, count and time left, and the text of the task's `field`, if given.

    A `Progress` is itself: whoever gives one shows it in a way of their own.
    """
    if isinstance(shown, Progress):
        return shown
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    texts = [TextColumn(f"{{task.fields[{field}]}}")] if field else []
    return Progress(*columns, *texts, disable=not shown)


def tracked(items: Iterable[Item], label: str, *, total: int | None, shown: bool = True) -> Iterator[Item]:
    """The items one by one; a bar on stderr from the first second on, if that is a terminal and `shown` is true."""
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
    """A matplotlib Figure with these settings. Raises PackageMissing, which says `why`, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissing(f"{why}: pip install 'loraweave[plot]'") from error
    return Figure(**settings)


def count_along(axes: Any) -> None:
    """Labels the horizontal axis with whole numbers only: it counts steps, candidates or evaluations."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


class ShownTable(Table):
    """A rich Table that a plain Python prompt prints as a table and a notebook shows as HTML that holds only text."""

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> ShownTable:
        """The table of these rows; columns of numbers are right-aligned, other values appear as text."""
        listed = [list(row) for row in rows]
        table = cls(title=title, title_justify="left")
        for position, column in enumerate(columns):
            number = bool(listed) and all(isinstance(row[position], int | float) for row in listed)
            table.add_column(column, justify="right" if number else "left")
        for row in listed:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
        return table

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


def _text(cell: object) -> str:
    return escape(str(cell))
