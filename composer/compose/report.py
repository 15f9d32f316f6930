"""The report of what compose() measured and chose: rows, a table, and the curves of searches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from loraweave.common.display import ShownTable, blank_figure, count_along
from loraweave.errors import CompositionError


@dataclass(frozen=True)
class ReportRow:
    """One way to answer the task, measured on its examples.

    `held_out_loss` is the mean loss of examples that had no part in choosing the weights (cross-validated), `loss` that of
    all examples after choosing on all; `held_out_hits` is the share of held-out examples that greedy decoding would write.
    Both held-out figures are None for what learned without folds, and for what was made of a composition afterwards.
    `weights` are means over the layers where `by_layer` is given.
    `num_trained` counts the scalars that were chosen, `losses` are those of a search's candidates, terms for the weights
    included, and None for the `failed` ones that could not be scored.
    """

    name: str
    weights: Mapping[str, float]
    loss: float | None
    held_out_loss: float | None
    held_out_hits: float | None
    seconds: float
    evaluations: int
    by_layer: Mapping[str, Mapping[str, float]] | None = None
    num_trained: int = 0
    failed: int = 0
    losses: tuple[float | None, ...] = ()


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

    def with_choice(self, row: ReportRow, reason: str) -> Report:
        """Return the report with `row` as its choice; it replaces an earlier row of the same name."""
        return replace(
            self,
            rows=(*(other for other in self.rows if other.name != row.name), row),
            chosen=row.name,
            reason=reason,
            seconds=self.seconds + row.seconds,
            evaluations=self.evaluations + row.evaluations,
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON; a loss that is not finite, which JSON has no number for, is None."""
        fields = asdict(self)
        for row in fields["rows"]:
            row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return fields

    def table(self) -> ShownTable:
        """Return the rows as a table; the chosen one is marked."""

        def cell(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        table = ShownTable(title=f"chosen: {self.chosen} ({self.reason})", title_justify="left")
        for column in ("", "loss", "held-out loss", "held-out hits", "trained", "seconds", "evaluations"):
            table.add_column(column, justify="left" if not column else "right")
        for row in self.rows:
            figures = (cell(row.loss, ".3f"), cell(row.held_out_loss, ".3f"), cell(row.held_out_hits, ".0%"))
            spent = (str(row.num_trained), f"{row.seconds:.1f}", str(row.evaluations))
            style = "bold" if row.name == self.chosen else ""
            table.add_row(row.name, *figures, *spent, style=style)
        return table

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, path: str | Path) -> Path:
        """Draw the lowest loss so far of every search that was run on all examples; the suffix names the format.

        Raises PackageMissing without matplotlib, CompositionError where nothing was searched.
        """
        searched = [row for row in self.rows if row.losses]
        if not searched:
            raise CompositionError("nothing was searched, so there is no curve to draw: the ways compared are in table()")
        figure = blank_figure("the curves of searches are drawn with matplotlib", figsize=(6.0, 3.5), layout="constrained")
        axes = figure.subplots()
        for row in searched:
            losses = [math.inf if loss is None else loss for loss in row.losses]
            axes.step(range(1, len(losses) + 1), list(accumulate(losses, min)), where="post", label=row.name)
        for row in self.rows:
            if row.name in ("base", "best_single") and row.loss is not None:
                axes.axhline(row.loss, linestyle=":", color="#999999")
                axes.annotate(row.name, (1, row.loss), color="#666666", fontsize="small")
        axes.set_xlabel("candidates")
        count_along(axes)
        axes.set_ylabel("loss on the examples")
        axes.legend(frameon=False)
        figure.savefig(path)
        return Path(path)
