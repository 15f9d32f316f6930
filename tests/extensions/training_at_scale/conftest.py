"""A base on the disk, which workers can load, and workers that are warm."""

from __future__ import annotations

import pytest
from warm_workers import warm_workers as warm_workers

import loraweave as lw


@pytest.fixture(scope="module")
def base(make_model, tokenizer, tmp_path_factory):
    """(model, tokenizer) from a folder."""
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lw.load_base(folder)
