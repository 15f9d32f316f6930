"""What tests of approximate indexes share: vectors that lie in clusters, and how many of the best an index finds."""

from __future__ import annotations

import numpy as np
import pytest

from loraweave.hub.indexes.flat import Flat


@pytest.fixture(scope="session")
def clustered():
    """clustered(count, dim, seed): unit vectors (count, dim) around 60 centres."""

    def draw(count, dim=24, seed=0):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(60, dim))[rng.integers(60, size=count)] + 0.4 * rng.normal(size=(count, dim))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def recall():
    """recall(index, vectors, query, k): the share of the k best, by the exact index, that the index of the vectors finds."""

    def share(index, vectors, query, k=10, **mask):
        flat = Flat(vectors.shape[1])
        flat.add(vectors)
        found, want = index.search(query, k, **mask), flat.search(query, k, **mask)
        assert found[0].shape == want[0].shape
        return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found[1], want[1], strict=True)]) / k

    return share
