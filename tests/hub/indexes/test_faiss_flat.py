from __future__ import annotations

import sys

import numpy as np
import pytest

from loraweave.errors import PackageMissing
from loraweave.hub.indexes.faiss_flat import FaissFlat
from loraweave.hub.indexes.flat import Flat


def test_many_near_ties_give_the_reference_bit_for_bit():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(1, 48))
    vectors = centre + 1e-7 * rng.normal(size=(500, 48))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = rng.normal(size=(3, 48)).astype(np.float32)
    flat, fast = Flat(48), FaissFlat(48)
    flat.add(vectors)
    fast.add(vectors)
    for k in (1, 17, 500):
        for want, got in zip(flat.search(query, k), fast.search(query, k), strict=True):
            np.testing.assert_array_equal(got, want)


def test_without_faiss_the_message_has_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PackageMissing, match="pip install 'faiss-cpu"):
        FaissFlat(4)
