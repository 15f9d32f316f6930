"""The code of the pages on training, on the real model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str) -> dict[str, object]:
    text = (DOCS / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, f"docs/{page}", "exec"), names)
    return names


@pytest.mark.slow
def test_the_code_of_the_page_on_continual_training_runs():
    assert [adapter.rank for adapter in run("continual.md")["adapters"].values()] == [4, 4]


@pytest.mark.slow
def test_the_code_of_the_page_on_training_runs():
    names = run("training.md")
    assert {name: adapter.rank for name, adapter in names["pool"].adapters.items()} == {
        "merged": 8,
        "past tense": 16,
        "plural": 16,
    }


@pytest.mark.slow
def test_the_code_of_the_page_on_training_routers_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    monkeypatch.chdir(tmp_path)
    report = run("router_training.md")["report"]
    assert [step for step, _ in report.evaluations] == [0, 1, 2]
    assert (tmp_path / "curve.png").is_file()


@pytest.mark.slow
def test_the_code_of_the_page_on_trained_experts_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    monkeypatch.chdir(tmp_path)
    names = run("experts.md")
    assert names["report"].experts == ("0", "1", "2")
    assert names["hub"]["mola-0"].rank == 4
