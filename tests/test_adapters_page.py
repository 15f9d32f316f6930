"""The page on other adapter types: its code runs, and it leaves no type of PEFT out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraweave import registry
from loraweave.hub.formats._reading import REFUSED

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
# rows of the table of types: the names in their first column, and what the second says
ROWS = {
    kind: text
    for names, text in re.findall(r"^\| (`[A-Z0-9_]+`[^|]*) \| ([^|]*) \|", PAGE, re.MULTILINE)
    for kind in re.findall(r"`([A-Z0-9_]+)`", names)
}


# peft asks transformers for an attribute that has been renamed there
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/adapters.md")
    assert names["exact"].rank == 8
    assert all(note["relative_error"] <= 0.2 for note in names["close"].card["conversion"].values())
    assert names["extracted"].rank == 4
    assert set(names["both"].layers) == set(names["exact"].layers)


def test_every_type_of_the_installed_peft_has_a_row():
    assert set(ROWS) == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_the_page_refuses_what_the_reader_refuses():
    assert {kind for kind, text in ROWS.items() if text.startswith("refused")} == set(REFUSED)
    read = {name.upper() for name in registry.names("formats")}
    assert {kind for kind, text in ROWS.items() if not text.startswith("refused")} <= read | {"LORA"}
