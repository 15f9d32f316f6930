"""The pages of the extension: a recipe of one's own, experts for whole rows, and dense prediction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from loraweave import registry

DOCS = Path(__file__).parents[3] / "docs" / "extensions"


@pytest.mark.slow
def test_the_page_makes_and_trains_a_recipe_of_its_own(run_page):
    names = run_page("docs/extensions/recipes.md")
    assert names["mine"].training_report.terms.keys() == {"sparsity"}
    names["mine"].close()


def test_the_recipes_of_the_page_on_row_experts_are_there():
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "recipes_rows.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == 7
    assert set(named) <= set(registry.names("experts"))


def test_the_page_on_dense_prediction_trains_two_tasks(run_page):
    names = run_page("docs/extensions/recipes_dense.md")
    assert names["depth"].shape == (4, 8, 8)
    experts = names["model"].expert_parameters()
    assert all(bool(value.any()) for name, value in experts.items() if name.endswith("b_SO"))
    learned = {name for name in names["model"].learning() if name.startswith("base_model.")}
    assert learned == {f"base_model.decode_head.{name}" for name, _ in names["base"].decode_head.named_parameters()}


def test_the_page_on_row_experts(run_page):
    with torch.random.fork_rng():
        names = run_page("docs/extensions/recipes_rows.md")
    assert names["answer"].shape == (1, 4)
    assert names["model"].tasks == ("law", "games", "health")
    assert names["law"].rank == 4
    assert names["merged"].name == "moelora-law"
    names["model"].close()
    names["by_task"].close()
