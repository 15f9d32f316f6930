"""The curves of searches and trainings show what the reports hold, with whole numbers on the axis that counts."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from loraweave.composer.compose.report import Report, ReportRow
from loraweave.errors import CompositionError, PackageMissing
from loraweave.extensions.explain import plot_search, plot_searches, plot_training
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.tokens._learned import TrainingReport
from loraweave.routers.weights import MixtureWeights


def row(name: str, loss: float | None, losses: tuple[float | None, ...] = ()) -> ReportRow:
    return ReportRow(name, {"a": 1.0}, loss, None, None, 0.0, len(losses), losses=losses)


def composition(*rows: ReportRow) -> Any:
    return SimpleNamespace(report=Report(rows, rows[-1].name, "", (), 0.0, 0))


def searched(losses: tuple[float, ...]) -> Any:
    return composition(row("lorahub", min(losses), losses))


def result(losses: tuple[float, ...]) -> SearchResult:
    return SearchResult(MixtureWeights.of({"a": 1.0}, ["a"]), min(losses), losses, cost=2)


def training(losses: tuple[float, ...]) -> TrainingReport:
    return TrainingReport(("a", "b"), losses=list(losses), entropy=[0.5] * len(losses), load=[(1, [0.5, 0.5])])


MADE = [(plot_searches, searched), (plot_search, result), (plot_training, training)]


@pytest.fixture
def figures(monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    saved, original = [], figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path: (saved.append(figure), original(figure, path)))
    return saved


@pytest.mark.parametrize("count", [1, 2, 4, 250])
@pytest.mark.parametrize(("plot", "make"), MADE)
def test_an_axis_that_counts_has_ticks_at_whole_numbers_only(plot, make, count, tmp_path, figures):
    path = plot(make(tuple(1.0 / step for step in range(1, count + 1))), tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes[-1]
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown
    assert all(float(tick).is_integer() for tick in shown)


def test_a_search_is_drawn_by_its_candidates_and_the_lowest_so_far(tmp_path, figures):
    plot_search(result((3.0, math.inf, 2.0, 2.5)), tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    candidates, lowest = figures[0].axes[0].lines
    assert list(candidates.get_xdata()) == list(lowest.get_xdata()) == [2, 4, 6, 8]
    assert list(candidates.get_ydata()) == [3.0, math.inf, 2.0, 2.5]
    assert list(lowest.get_ydata()) == [3.0, 3.0, 2.0, 2.0]


def test_the_searches_of_a_composition_are_drawn_side_by_side_with_what_needs_none(tmp_path, figures):
    rows = (row("base", 4.0), row("uniform", 3.0), row("lorahub", 1.0, (3.0, None, 1.0)), row("cma", 2.0, (2.0, 2.5)))
    plot_searches(composition(*rows), tmp_path / "curves.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert (lines["lorahub"], lines["cma"]) == ([3.0, 3.0, 1.0], [2.0, 2.0])
    assert [values for name, values in lines.items() if name not in ("lorahub", "cma")] == [[4.0, 4.0]]


def test_where_nothing_was_searched_there_is_no_curve(tmp_path):
    with pytest.raises(CompositionError, match="nothing was searched"):
        plot_searches(composition(row("uniform", 3.0)), tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_a_training_is_drawn_by_losses_load_and_entropy(tmp_path, figures):
    names = tuple("abcdefghij")
    loads = [(step, [(place + step) / 65 for place in range(10)]) for step in (1, 2)]
    losses = [float(step) for step in range(12)]
    report = TrainingReport(names, losses=losses, entropy=[0.5] * 12, evaluations=[(0, 5.0), (12, 4.0)], load=loads)
    plot_training(report, tmp_path / "training.png")
    above, middle, below = figures[0].axes
    each, means, held_out = (list(line.get_ydata()) for line in above.lines)
    assert each == losses
    assert means == pytest.approx([sum(losses[max(0, at - 9) : at + 1]) / min(at + 1, 10) for at in range(12)])
    assert held_out == [5.0, 4.0]
    lines = {line.get_label(): list(line.get_ydata()) for line in middle.lines}
    assert list(lines) == [*"jihgfedc", "the other 2"]
    assert lines["the other 2"] == pytest.approx([sum(load[:2]) for _, load in loads])
    assert list(below.lines[0].get_ydata()) == report.entropy


@pytest.mark.parametrize(("plot", "make"), MADE)
def test_without_matplotlib_each_says_what_to_install(plot, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PackageMissing, match=r"loraweave\[plot\]"):
        plot(make((2.0, 1.0)), tmp_path / "curve.png")
