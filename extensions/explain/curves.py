"""Plots of searches and trainings, drawn with matplotlib; the suffix of the path names the format."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from loraweave import Composition, CompositionError
from loraweave.extend import blank_figure
from loraweave.extend.routing import TrainingReport

# the most lines in one picture that can be told apart
NUM_SHOWN = 8


class Searched(Protocol):
    """A protocol for the result of a search: the losses of its candidates, and the lowest loss so far by evaluations."""

    @property
    def losses(self) -> Sequence[float]:
        """The loss of every candidate, in the order of their evaluation."""

    def curve(self) -> Sequence[tuple[int, float]]:
        """Return (evaluations so far, lowest loss so far) after each candidate."""


def plot_search(result: Searched, path: str | Path) -> Path:
    """Draw the losses of a search, with the lowest so far, and return the path. Raises PackageMissing without matplotlib."""
    spent, best = zip(*result.curve(), strict=True)
    figure = blank_figure("the curve of a search is drawn with matplotlib", figsize=(6.0, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(spent, result.losses, ".", color="#999999", label="candidate")
    axes.step(spent, best, where="post", color="#0072B2", label="lowest so far")
    _count_along(axes, "evaluations")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    figure.savefig(path)
    return Path(path)


def plot_searches(composition: Composition, path: str | Path) -> Path:
    """Draw the lowest loss so far of every search in a composition's report, and return the path.

    Raises PackageMissing without matplotlib, CompositionError where nothing was searched on all examples.
    """
    rows = composition.report.rows
    searched = [row for row in rows if row.losses]
    if not searched:
        raise CompositionError("nothing was searched, so there is no curve to draw: the ways compared are in table()")
    figure = blank_figure("the curves of searches are drawn with matplotlib", figsize=(6.0, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in searched:
        losses = [math.inf if loss is None else loss for loss in row.losses]
        axes.step(range(1, len(losses) + 1), list(accumulate(losses, min)), where="post", label=row.name)
    for row in rows:
        if row.name in ("base", "best_single") and row.loss is not None:
            axes.axhline(row.loss, linestyle=":", color="#999999")
            axes.annotate(row.name, (1, row.loss), color="#666666", fontsize="small")
    _count_along(axes, "candidates")
    axes.set_ylabel("loss on the examples")
    axes.legend(frameon=False)
    figure.savefig(path)
    return Path(path)


def plot_training(report: TrainingReport, path: str | Path) -> Path:
    """Draw the losses, the load of the experts and the entropy over the steps of a training, and return the path.

    Raises PackageMissing without matplotlib.
    """
    figure = blank_figure("a training is drawn with matplotlib", figsize=(6.0, 7.0), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True)
    steps, losses = range(1, len(report.losses) + 1), report.losses
    # of the last ten steps, of fewer at the beginning
    means = [sum(part) / len(part) for part in (losses[max(0, end - 10) : end] for end in steps)]
    above.plot(steps, losses, color="#9db8d2", linewidth=0.8, label="each step")
    above.plot(steps, means, color="#1f4e79", label="mean of 10 steps")
    if report.evaluations:
        above.plot(*zip(*report.evaluations, strict=True), "o-", color="#c0504d", markersize=3, label="held out")
    above.set_ylabel("loss")
    above.legend(frameon=False, fontsize="small")
    middle.set_ylabel("load")
    if report.load:
        _draw_load(middle, report)
    below.plot(range(1, len(report.entropy) + 1), report.entropy, color="#1f4e79")
    below.set_ylabel("entropy of a token's\nweights (nats)")
    _count_along(below, "step")
    figure.savefig(path)
    return Path(path)


def _draw_load(axes: Any, report: TrainingReport) -> None:
    steps, loads = zip(*report.load, strict=True)
    largest = sorted(range(len(report.experts)), key=lambda place: -loads[-1][place])[:NUM_SHOWN]
    for place in largest:
        axes.plot(steps, [load[place] for load in loads], label=report.experts[place])
    if len(report.experts) > NUM_SHOWN:
        others = [sum(load) - sum(load[place] for place in largest) for load in loads]
        axes.plot(steps, others, color="#999999", linestyle=":", label=f"the other {len(report.experts) - NUM_SHOWN}")
    axes.legend(frameon=False, fontsize="x-small", ncols=2)


def _count_along(axes: Any, counted: str) -> None:
    """Label the horizontal axis with the name of the counted things, and put ticks at whole numbers only."""
    axes.set_xlabel(counted)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
