"""Tables of the command line in 40, 60 and 80 columns: numbers and headings stay whole, and what is left out is named."""

from __future__ import annotations

import pytest
from command_line import adapter, check_table

import loraweave as lw

NAMES = ("left", "right", "pick_adjective_5_of_a_list_whose_words_are_many")

pytestmark = pytest.mark.parametrize("width", [40, 60, 80])


@pytest.fixture
def hub(here, words_embedder):
    with lw.Hub("adapters") as opened:
        for seed, name in enumerate(NAMES):
            made = adapter(name, seed, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
            opened.add(made, license="Apache-2.0", tags=["pool", "lists"], description="Choose the adjective of a list.")


@pytest.mark.parametrize(
    "words",
    [["list"], ["search", "the adjective"], ["show", NAMES[2]], ["show", NAMES[2], "--all"], ["history", NAMES[2]]],
    ids=str,
)
def test_the_tables_of_a_hub(words, width, hub, monkeypatch):
    check_table(["hub", *words], width, monkeypatch)


def test_the_report_of_a_merge(width, two, monkeypatch):
    check_table(["merge", two / "left", two / "right", "--weights", "0.7,-0.4", "--force", "--out", "m"], width, monkeypatch)


def test_the_report_of_a_composition_and_its_score(width, base, two, rows, monkeypatch):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "lorahub", "--budget", 9, "--out", "c"]
    check_table(["compose", *words], width, monkeypatch)
    check_table(["eval", "c", rows], width, monkeypatch)
