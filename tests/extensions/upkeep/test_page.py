"""The page on upkeep: its code runs, and a lost catalogue comes back. Tests of hubs and of faults call `rebuild`, too."""

from __future__ import annotations

import loraweave as lw


def test_the_code_of_the_page_runs(run_page):
    assert sorted(run_page("docs/extensions/upkeep.md")["names"]) == ["antonym", "passive"]
    with lw.Hub("adapters") as hub:
        assert hub.verify().ok
