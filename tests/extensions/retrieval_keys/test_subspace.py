"""The key that compares what weights read and write, against dense updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.extensions.retrieval_keys.keys.subspace import overlap
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Factors


def adapter(name, seed, near=None, share=0.0):
    torch.manual_seed(seed)
    layers = {f"layers.{n}": Factors(torch.randn(4, 40), torch.randn(50, 4)) for n in range(24)}
    if near is not None:
        layers = {
            layer: Factors(
                share * near.layers[layer].a_RI + (1 - share) * factors.a_RI,
                share * near.layers[layer].b_OR + (1 - share) * factors.b_OR,
            )
            for layer, factors in layers.items()
        }
    return Adapter(name, "base", layers)


def test_overlap_is_the_mean_squared_cosine_of_principal_angles_of_the_dense_updates():
    one = adapter("one", 0)
    other = adapter("other", 1, one, 0.6)
    expected = []
    for layer in one.layers:
        parts = [np.linalg.svd(x.delta(layer).double().numpy()) for x in (one, other)]
        for side in (0, 2):
            left, right = (part[side] if side == 0 else part[side].T for part in parts)
            expected.append((np.linalg.svd(left[:, :4].T @ right[:, :4])[1] ** 2).mean())
    assert overlap(one, other) == pytest.approx(np.mean(expected), abs=1e-6)


def test_overlap_of_an_update_with_itself_is_one_and_without_a_shared_layer_nothing():
    one = adapter("one", 0)
    assert overlap(one, one) == pytest.approx(1.0)
    elsewhere = Adapter("x", "base", {"head": Factors(torch.randn(4, 40), torch.randn(50, 4))})
    assert np.isnan(overlap(one, elsewhere))


@pytest.mark.parametrize("keys", [("subspace",), ("spectral", "subspace")])
def test_like_finds_the_nearest_in_weights_and_leaves_out_the_adapter_itself(tmp_path, keys):
    one = adapter("one", 0)
    with Hub(tmp_path) as hub:
        for stored in (one, adapter("far", 1), adapter("near", 2, one, 0.8), adapter("middle", 3, one, 0.6)):
            hub.add(stored)
        found = Retriever(hub, embedder="hashing").like("one", keys=keys)
        given = Retriever(hub, embedder="hashing").like(one, keys=keys, k=1)
    assert [candidate.name for candidate in found] == ["near", "middle", "far"]
    assert [candidate.name for candidate in given] == ["one"]
    assert given[0].score == pytest.approx(1.0, abs=1e-5)


def test_a_damaged_adapter_is_left_out(tmp_path):
    with Hub(tmp_path) as hub:
        for seed, name in enumerate(("one", "two", "three")):
            hub.add(adapter(name, seed))
        next(tmp_path.rglob(f"*{hub.record('two').hash}*")).write_bytes(b"damaged")
        found = Retriever(hub, embedder="hashing").like("one", keys=("subspace",))
    assert [candidate.name for candidate in found] == ["three"]
