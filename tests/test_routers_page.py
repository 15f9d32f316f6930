"""docs/routers.md: its code runs on the embedded model, and its table names every router."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loraweave.routers.tokens._saved import router_class, router_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "routers.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page, tmp_path):
    names = run_page("docs/routers.md")
    assert names["arrow"].experts == names["engine"].pool.names == (*names["names"][:1], *names["names"][2:], "antonym")
    composition = names["composition"]
    assert composition.report.chosen == "spectr"
    assert composition.predict(["run", "eat"]) == ["ran", "ate"]
    assert sorted(path.name for path in (tmp_path / "composed").iterdir()) == ["composition.json", "router"]


def rows():
    """{router: the cells of its row}."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_its_table_names_every_router():
    assert set(router_names()) <= set(rows())


@pytest.mark.parametrize("name", router_names())
def test_its_table_says_what_is_trained_and_who_can_join(name):
    _, trained, joins, _ = rows()[name]
    made = router_class(name)
    assert made.learned == trained.startswith("yes")
    assert (made.per_expert is not None) == joins.startswith("yes")
