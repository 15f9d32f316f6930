"""A base model in a folder, a pool of two adapters for it, a file of rows, and an embedder that needs no model."""

from __future__ import annotations

import numpy as np
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


class WordEmbedder:
    """Counts of three words, so that a search is known without a model."""

    dim = 3
    id = "words"

    def embed(self, texts):
        counts = np.array([[text.count(word) + 1e-3 for word in ("opposite", "smile", "query")] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def words_embedder(monkeypatch):
    from loraweave import registry

    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: WordEmbedder if folder == "embedders" else get(folder, name))
