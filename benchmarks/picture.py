"""Draws the ways to solve an unseen task, and where a hub pays, from data/unseen.json: two pictures, light and dark.

docs/images/ways-*.svg, of which ways-narrow-*.svg are for phones, and docs/images/where-a-hub-pays-*.svg are written by

python -m benchmarks picture
"""

from __future__ import annotations

import re
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
# name in the picture, its column in the table
WAYS = (
    ("base model", "base"),
    ("base, five examples in the prompt", "in_context"),
    ("LoRA trained on the five examples", "lora_examples"),
    ("loraweave, the five examples and stored adapters", "auto"),
    ("LoRA trained on the whole training set", "oracle"),
)


@app.command()
def main() -> None:
    """Write both pictures in both themes."""
    for theme in THEMES:
        paths = (draw_ways(theme, FOLDER), draw_ways(theme, FOLDER, narrow=True), draw(theme, FOLDER))
        console.print(f"written: {', '.join(map(str, paths))}")


def draw_ways(theme: str, folder: Path, *, narrow: bool = False) -> Path:
    """Write the mean share of right answers of each way, with its interval, in one theme; equal data give equal bytes.

    The narrow picture has a phone's width, and the name of each way above its interval instead of beside it.
    """
    plt = _pyplot()
    background, ink, _, accent = THEMES[theme]
    table = tables()["unseen, 5 examples, scores"]
    mean = next(
        cells for row in table.rows if (cells := dict(zip(table.columns, row, strict=True)))["task"] == "mean of all"
    )
    size = (4.2, 0.62 * len(WAYS) + 0.9) if narrow else (9, 0.45 * len(WAYS) + 0.9)
    figure, axes = plt.subplots(figsize=size, facecolor=background)
    for place, (label, column) in enumerate(WAYS):
        value, low, high = map(float, re.findall(r"[\d.]+", mean[column]))
        colour = accent if column == "auto" else ink
        axes.plot([low, high], [place] * 2, color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axes.scatter([value], [place], color=colour, s=70, zorder=2)
        axes.annotate(f"{value:.3f}", (high, place), (8, 0), textcoords="offset points", color=colour, va="center")
        if narrow:
            axes.text(0, place - 0.42, label, color=colour, va="center")
    axes.set_yticks([] if narrow else range(len(WAYS)), [] if narrow else [label for label, _ in WAYS])
    axes.set_ylim(len(WAYS) - 0.5, -0.8 if narrow else -0.5)
    axes.set_xlim(0, 0.65)
    about = ("share of right answers on unseen tasks,", "mean and 95 % interval")
    axes.set_xlabel(("\n" if narrow else " ").join(about), color=ink)
    return _written(figure, axes, theme, folder / f"ways-{'narrow-' if narrow else ''}{theme}.svg")


def draw(theme: str, folder: Path) -> Path:
    """Write the picture in one theme; the same data give the same bytes."""
    plt = _pyplot()
    background, ink, _, accent = THEMES[theme]
    table = tables()["unseen, where a hub pays"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.5), facecolor=background)
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
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, labelcolor=ink, fontsize=10, handletextpad=0.3
    )
    return _written(figure, axes, theme, folder / f"where-a-hub-pays-{theme}.svg")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "loraweave", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    )
    import matplotlib.pyplot as plt

    return plt


def _written(figure: Any, axes: Any, theme: str, path: Path) -> Path:
    """Style the axes, write the figure to `path` and close it; return the path."""
    background, ink, grid, _ = THEMES[theme]
    axes.set_facecolor(background)
    axes.tick_params(colors=ink, length=0)
    axes.grid(axis="x", color=grid)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor=background, metadata={"Date": None})
    _pyplot().close(figure)
    return path
