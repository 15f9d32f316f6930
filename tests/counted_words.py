"""An embedder whose vectors can be written out by hand."""

from __future__ import annotations

import numpy as np

WORDS = ("cat", "dog", "sum", "film", "word")


class Counts:
    """The unit vector of how often each of five words occurs, so that keys can be written out by hand."""

    dim = 5

    def __init__(self, name="counts"):
        self.id = name
        self.seen = []

    def embed(self, texts):
        self.seen.extend(texts)
        rows = np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=np.float64).reshape(-1, 5)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / np.where(norms, norms, 1)).astype(np.float32)
