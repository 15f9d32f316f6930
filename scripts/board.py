#!/usr/bin/env python3
"""Draw the board of deploy/grafana.json over a server's figures: `python scripts/board.py http://127.0.0.1:9090 15 [END]`.

The address is that of a Prometheus which scrapes the server; 15 are the minutes until now, or until END, in Unix time.
Panels lie where Grafana has them and show what Prometheus answers to their expressions, but matplotlib draws them, into
docs/images/board.png.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
BOARD, PICTURE = ROOT / "deploy" / "grafana.json", ROOT / "docs" / "images" / "board.png"
# columns of Grafana's grid, and inches of one and of a row
COLUMNS, WIDTH, HEIGHT = 24, 0.55, 0.34
NUM_POINTS = 240
# what a panel's unit divides its values by, and its name on the axis
UNITS = {"bytes": (2**20, "MiB"), "s": (1, "s"), "reqps": (1, "1/s"), "short": (1, "")}


def main() -> None:
    """Draw all panels in one picture."""
    url, minutes, end = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else time.time()
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    num_rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(COLUMNS * WIDTH, num_rows * HEIGHT), layout="constrained")
    grid = figure.add_gridspec(num_rows, COLUMNS)
    for panel in panels:
        place = panel["gridPos"]
        rows = slice(place["y"], place["y"] + place["h"])
        axes = figure.add_subplot(grid[rows, place["x"] : place["x"] + place["w"]])
        draw(axes, panel, [line for target in panel["targets"] for line in lines_of(url, target, minutes, end)])
    figure.savefig(PICTURE, dpi=80)


def lines_of(url: str, target: dict[str, Any], minutes: float, end: float) -> list[tuple[str, list[float], list[float]]]:
    """Return (legend, minutes since the end, values) of each series that Prometheus answers to a panel's expression."""
    span = {"start": end - 60 * minutes, "end": end, "step": 60 * minutes / NUM_POINTS}
    asked = urllib.parse.urlencode({"query": target["expr"], **span})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}") as answer:
        series = json.load(answer)["data"]["result"]
    lines = []
    for one in series:
        times, values = zip(*((float(at), float(value)) for at, value in one["values"]), strict=True)
        kinds = {name: value for name, value in one["metric"].items() if name not in ("instance", "job", "__name__")}
        labels = ", ".join(f"{name} {value}" for name, value in kinds.items())
        legend = labels if target["legendFormat"] == "__auto" else target["legendFormat"]
        lines.append((legend, [(at - end) / 60 for at in times], list(values)))
    return lines


def draw(axes: Any, panel: dict[str, Any], lines: list[tuple[str, list[float], list[float]]]) -> None:
    """Draw one panel, stacked if the board stacks it."""
    defaults = panel["fieldConfig"]["defaults"]
    divisor, unit = UNITS[defaults["unit"]]
    scaled = [(legend, at, [value / divisor for value in values]) for legend, at, values in lines]
    if "stacking" in defaults.get("custom", {}):
        axes.stackplot(
            scaled[0][1], [values for _, _, values in scaled], labels=[legend for legend, *_ in scaled], alpha=0.6
        )
    else:
        for legend, at, values in scaled:
            axes.plot(at, values, label=legend, linewidth=1.2)
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xlabel("minutes", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if any(legend for legend, _, _ in scaled):
        axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
