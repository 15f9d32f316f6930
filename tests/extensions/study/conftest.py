"""A tiny base model, a pool of two adapters for it, and the file of a small task."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from warm_workers import warm_workers as warm_workers

import loraweave as lw
from loraweave.extensions.study import study

WORDS = ["ab", "ba", "cd", "dc", "ef", "fe", "gh", "hg"]


@pytest.fixture
def rows():
    return [{"input": word, "target": word[::-1], "instruction": "swap"} for word in WORDS]


@pytest.fixture
def folder(tmp_path, tiny_llama, make_adapter, rows):
    """A folder with pool/a, pool/b and swap.jsonl."""
    for seed, name in enumerate("ab"):
        adapter = make_adapter(tiny_llama, name, seed=seed)
        replace(adapter, fingerprint=lw.base_key(tiny_llama).fingerprint).save_pretrained(tmp_path / "pool" / name)
    (tmp_path / "swap.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def said(folder):
    """The keys of a study of the base alone, on three of eight rows."""
    keys = {"shots": 2, "num_test": 3, "out": str(folder / "out")}
    return {"pool": str(folder / "pool"), "tasks": str(folder / "swap.jsonl"), "methods": ["base"], **keys}


@pytest.fixture
def run(said, tiny_llama, tokenizer):
    """run(**changed): that study with other keys."""

    def run(*, functions=None, **changed):
        return study({**said, **changed}, model=tiny_llama, tokenizer=tokenizer, metrics=functions, progress=False)

    return run
