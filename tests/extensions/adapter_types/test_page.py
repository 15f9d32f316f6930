"""The page on further types: its code runs, and each type of the installed peft has a row there or on the core's page."""

import re
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraweave import registry

DOCS = Path(__file__).parents[3] / "docs"


def kinds(page):
    """The types in the first column of the page's table."""
    text = (DOCS / page).read_text(encoding="utf-8")
    firsts = re.findall(r"^\| (`[A-Z0-9_]+`[^|]*) \|", text, re.MULTILINE)
    return {kind for first in firsts for kind in re.findall(r"`([A-Z0-9_]+)`", first)}


def test_every_type_of_the_installed_peft_has_a_row():
    more = kinds("extensions/adapter_types.md")
    assert kinds("adapters.md") | more == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert more - {"LORA"} <= {name.upper() for name in registry.names("formats")}


# peft asks transformers for an attribute that has been renamed there
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/adapter_types.md")
    assert names["exact"].rank == 8
    assert all(note["relative_error"] <= 0.2 for note in names["close"].card["conversion"].values())
    assert set(names["both"].layers) == set(names["exact"].layers)
