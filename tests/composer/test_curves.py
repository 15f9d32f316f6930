"""The curves of searches and of trainings: what is counted has whole numbers on its axis."""

import pytest

from loraweave.composer.compose.report import Report, ReportRow
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.tokens._learned import TrainingReport
from loraweave.routers.weights import MixtureWeights


def report(losses):
    row = ReportRow("lorahub", {"a": 1.0}, min(losses), None, None, 0.0, len(losses), losses=losses)
    return Report((row,), "lorahub", "", (), 0.0, len(losses))


def result(losses):
    return SearchResult(MixtureWeights.of({"a": 1.0}, ["a"]), min(losses), losses)


def training(losses):
    return TrainingReport(("a", "b"), losses=list(losses), entropy=[0.5] * len(losses), load=[(1, [0.5, 0.5])])


@pytest.mark.parametrize("count", [1, 2, 4, 250])
@pytest.mark.parametrize("make", [report, result, training])
def test_an_axis_that_counts_has_ticks_at_whole_numbers_only(make, count, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    saved, original = [], figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path: (saved.append(figure), original(figure, path)))
    make(tuple(1.0 / step for step in range(1, count + 1))).plot(tmp_path / "curve.png")
    axes = saved[0].axes[-1]
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown
    assert all(float(tick).is_integer() for tick in shown)
