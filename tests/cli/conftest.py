"""A base model in a folder, a pool of two adapters for it, and a file of rows."""

from __future__ import annotations

import pytest
from command_line import adapter, write_rows

PAIRS = [("a", "b"), ("c", "d"), ("e", "f")]


@pytest.fixture(scope="session")
def base(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def two(here):
    for seed, name in enumerate(("left", "right")):
        adapter(name, seed).save_pretrained(here / "pool" / name)
    return here / "pool"


@pytest.fixture
def rows(here):
    return write_rows(here / "rows.jsonl", [{"input": text, "target": target} for text, target in PAIRS])
