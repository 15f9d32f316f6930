"""The page on more routers and searches: its code runs."""

import re
from pathlib import Path

import pytest

from loraweave.extend.routing import router_class

PAGE = (Path(__file__).parents[3] / "docs" / "extensions" / "routers.md").read_text(encoding="utf-8")
ROUTERS = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Routers")[2].partition("\n`loraweave")[0], re.MULTILINE)


def test_the_table_has_rows():
    assert {"spectr", "ramole", "wemoe"} <= set(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_table_says_what_is_trained_and_who_can_join(name):
    _, trained, joins, _ = (cell.strip() for cell in re.search(rf"^\| `{name}` \|(.*)\|$", PAGE, re.MULTILINE)[1].split("|"))
    assert router_class(name).learned == trained.startswith("yes")
    assert (router_class(name).per_expert is not None) == joins.startswith("yes")


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/routers.md")
    assert names["routed"].report.chosen == "spectr"
    assert names["routed"].predict(["run", "eat"]) == ["ran", "ate"]
    assert names["searched"].report["first_order"].evaluations <= 8
    assert len(names["parts"]) == 5
