"""A pool of two adapters for the base, a file of rows, and an embedder that needs no model."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import adapter, write_rows

PAIRS = [("a", "b"), ("c", "d"), ("e", "f")]


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
