"""The page on objectives: its code runs on the example pool, and it names every kind of loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loraweave import registry

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/objectives.md")
    ((first,), (second,)) = names["alone"]
    # the folds' terms are those of the whole
    assert (2 * first + second) / 3 == pytest.approx(names["losses"][0], rel=1e-4)
    assert math.isfinite(names["shortest"].loss)


def test_the_page_names_every_kind():
    assert [name for name in registry.names("objectives") if f"| `{name}` |" not in PAGE] == []
