"""Draws where a hub pays, from what data/unseen.json holds: docs/images/where-a-hub-pays.svg, light and dark.

python -m benchmarks picture
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from benchmarks._run import ROOT, console
from benchmarks._unseen_report import tables

app = typer.Typer()

FOLDER = ROOT / "docs" / "images"
# background, text, grid, and the colour of what has the hub
THEMES = {"light": ("#ffffff", "#1f2328", "#d0d7de", "#0969da"), "dark": ("#0d1117", "#e6edf3", "#30363d", "#58a6ff")}
# name in the legend, its column in the table, marker
SERIES = (
    ("base model", "base", "."),
    ("best without a hub", "best without a hub", "o"),
    ("the same call over a hub of noise", "over noise", "x"),
    ("compose() over the hub", "with it", "D"),
    ("LoRA trained on everything", "oracle", "|"),
)


@app.command()
def main() -> None:
    """Write the picture in both themes."""
    for theme in THEMES:
        console.print(f"written: {draw(theme, FOLDER)}")


def draw(theme: str, folder: Path) -> Path:
    """Write the picture in one theme; the same data give the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "loraweave", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    )
    import matplotlib.pyplot as plt

    background, ink, grid, accent = THEMES[theme]
    table = tables()["unseen, where a hub pays"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.5), facecolor=background)
    axes.set_facecolor(background)
    for place, row in enumerate(rows):
        values = {column: float(row[column].split()[0]) for _, column, _ in SERIES}
        axes.plot(
            [values["best without a hub"], values["with it"]], [place] * 2, color=accent, linewidth=3, alpha=0.45, zorder=1
        )
    for label, column, marker in SERIES:
        hub = column == "with it"
        style: dict[str, Any] = {"facecolors": "none"} if marker == "o" else {}
        axes.scatter(
            [float(row[column].split()[0]) for row in rows],
            range(len(rows)),
            marker=marker,
            s=70 if hub else 60,
            color=None if marker == "o" else (accent if hub else ink),
            edgecolors=ink if marker == "o" else None,
            label=label,
            zorder=4 if marker == "x" else 3 if hub else 2,
            **style,
        )
    axes.set_yticks(range(len(rows)), [f"{row['situation']} ({row['tasks']} tasks)" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1)
    axes.set_xlabel("share of right answers on unseen tasks", color=ink)
    axes.tick_params(colors=ink, length=0)
    axes.grid(axis="x", color=grid)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, labelcolor=ink, fontsize=10, handletextpad=0.3
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"where-a-hub-pays-{theme}.svg"
    figure.savefig(path, bbox_inches="tight", facecolor=background, metadata={"Date": None})
    plt.close(figure)
    return path
