"""What a composition was compared with, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ReportRow:
    """One way to answer the task, measured on its examples.

    `held_out_loss` is the mean loss of examples that had no part in choosing the weights (cross-validated), `loss` that of
    all examples after choosing on all; `held_out_hits` is the share of held-out examples that greedy decoding would write.
    """

    name: str
    weights: Mapping[str, float]
    loss: float
    held_out_loss: float
    held_out_hits: float
    seconds: float
    evaluations: int


@dataclass(frozen=True)
class Report:
    """The rows compared, which of them was chosen and why, and the candidates that retrieval brought."""

    rows: tuple[ReportRow, ...]
    chosen: str
    reason: str
    candidates: tuple[tuple[str, float], ...]
    seconds: float
    evaluations: int

    def __getitem__(self, name: str) -> ReportRow:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """The rows as a table; the chosen one is marked."""
        table = Table(title=f"chosen: {self.chosen} ({self.reason})", title_justify="left")
        for column in ("", "loss", "held-out loss", "held-out hits", "seconds", "evaluations"):
            table.add_column(column, justify="left" if not column else "right")
        for row in self.rows:
            figures = (f"{row.loss:.3f}", f"{row.held_out_loss:.3f}", f"{row.held_out_hits:.0%}", f"{row.seconds:.1f}")
            style = "bold" if row.name == self.chosen else ""
            table.add_row(row.name, *figures, str(row.evaluations), style=style)
        return table
