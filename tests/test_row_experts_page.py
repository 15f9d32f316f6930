"""The code of the page on experts for whole rows."""

import re
from pathlib import Path

import torch

from loraweave import registry

PAGE = (Path(__file__).parents[1] / "docs" / "row_experts.md").read_text(encoding="utf-8")


def test_its_code_runs(run_page):
    with torch.random.fork_rng():
        names = run_page("docs/row_experts.md")
    assert names["answer"].shape == (1, 4)
    assert names["model"].tasks == ("law", "games", "health")
    assert names["law"].rank == 4
    assert names["merged"].name == "moelora-law"
    names["model"].close()
    names["by_task"].close()


def test_its_recipes_are_there():
    named = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert len(named) == 7
    assert set(named) <= set(registry.names("experts"))
