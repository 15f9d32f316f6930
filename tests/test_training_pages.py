"""The code of the pages on training, on the real model."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_code_of_the_page_on_continual_training_runs(run_page):
    assert [adapter.rank for adapter in run_page("docs/continual.md")["adapters"].values()] == [4, 4]


@pytest.mark.slow
def test_the_code_of_the_page_on_training_runs(run_page):
    names = run_page("docs/training.md")
    assert {name: adapter.rank for name, adapter in names["pool"].adapters.items()} == {
        "merged": 8,
        "past tense": 16,
        "plural": 16,
    }


@pytest.mark.slow
def test_the_code_of_the_page_on_training_routers_runs(run_page, tmp_path):
    report = run_page("docs/router_training.md")["report"]
    assert [step for step, _ in report.evaluations] == [0, 1, 2]
    assert (tmp_path / "curve.png").is_file()


@pytest.mark.slow
def test_the_code_of_the_page_on_trained_experts_runs(run_page):
    names = run_page("docs/experts.md")
    assert names["report"].experts == ("0", "1", "2")
    assert names["hub"]["mola-0"].rank == 4
