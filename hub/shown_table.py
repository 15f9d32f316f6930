"""Tables of results for a terminal, a plain prompt and a notebook: every text in them is shown as it is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table


class ShownTable(Table):
    """A rich Table that a plain Python prompt shows as a table, and a notebook as HTML with nothing but text in it."""

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> ShownTable:
        """The table of these rows; columns of numbers are right-aligned, other values are shown as their text."""
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
        Console(file=written, width=width, markup=False, emoji=False, highlight=False, color_system=None).print(self)
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
