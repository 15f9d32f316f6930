"""docs/search.md: its code runs, and its table names every search."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loraweave import registry

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "search.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page, tmp_path):
    names = run_page("docs/search.md")
    assert names["result"].evaluations == 17
    assert names["result"].loss <= names["result"].losses[0]
    assert (tmp_path / "runs" / "lorahub.json").is_file()
    assert names["found"].loss < 0.01
    assert names["learned"].num_trained == 3 * len(names["engine"].target_layers)
    assert names["learned"].loss < names["learned"].losses[0]
    assert names["composition"].report["greedy"].evaluations <= 4 * 12


def test_its_table_names_every_search():
    page = PAGE.read_text(encoding="utf-8")
    searches = [name for name in registry.names("routers") if hasattr(registry.get("routers", name), "ask")]
    assert [name for name in searches if not re.search(rf"^\| .*`{name}`", page, re.MULTILINE)] == []
