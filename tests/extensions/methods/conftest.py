"""Adapters in a PEFT model, and as folders."""

from __future__ import annotations

import pytest
from command_line import adapter
from entries_ways import entries_way as entries_way
from one_layer_in_peft import in_peft as in_peft


@pytest.fixture
def two(here):
    for seed, name in enumerate(("left", "right")):
        adapter(name, seed).save_pretrained(here / "pool" / name)
    return here / "pool"
