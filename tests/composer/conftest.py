"""A base in a folder, warm workers, and the fixtures of `letters.py`."""

from __future__ import annotations

import pytest
from letters import letter_hub, trained_letters  # noqa: F401
from warm_workers import warm_workers as warm_workers

import loraweave as lw


@pytest.fixture(scope="module")
def base(make_model, tokenizer, tmp_path_factory):
    """(model, tokenizer) from a folder, which workers can load too."""
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lw.load_base(folder)
