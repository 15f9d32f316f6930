"""The keys that compare weights, against dense updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.hub.adapter import Adapter, cosine
from loraweave.hub.hub import Hub
from loraweave.retrieval.keys.spectral import sketch
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


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_the_inner_product_of_two_sketches_is_about_the_cosine_of_the_updates(share):
    one = adapter("one", 0)
    other = adapter("other", 1, one, share)
    exact, _ = cosine(one, other)
    assert float(sketch(one) @ sketch(other)) == pytest.approx(exact, abs=0.12)


def test_a_sketch_is_the_same_for_any_factors_of_one_update_and_any_scale():
    one = adapter("one", 0)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    layers = {name: Factors(turn @ f.a_RI, 3.0 * f.b_OR @ turn.T) for name, f in one.layers.items()}
    np.testing.assert_allclose(sketch(Adapter("other", "base", layers)), sketch(one), atol=1e-5)


def test_like_finds_the_nearest_in_weights_and_leaves_out_the_adapter_itself(tmp_path):
    one = adapter("one", 0)
    with Hub(tmp_path) as hub:
        for stored in (one, adapter("far", 1), adapter("near", 2, one, 0.8), adapter("middle", 3, one, 0.6)):
            hub.add(stored)
        found = Retriever(hub, embedder="hashing").like("one")
        given = Retriever(hub, embedder="hashing").like(one, k=1)
    assert [candidate.name for candidate in found] == ["near", "middle", "far"]
    assert [candidate.name for candidate in given] == ["one"]
    assert given[0].score == pytest.approx(1.0, abs=1e-5)


def test_sketches_are_kept_in_the_catalogue_and_made_anew_for_other_content(tmp_path):
    one, other = adapter("one", 0), adapter("two", 1)
    with Hub(tmp_path) as hub:
        hub.add(one)
        hub.add(other)
        retriever = Retriever(hub, embedder="hashing")
        retriever.like("one")
        kept = hub.vectors("spectral:1:24")
        assert {name: digest for name, (digest, _) in kept.items()} == {"two": hub.record("two").hash}
        np.testing.assert_array_equal(kept["two"][1], sketch(other))
        hub.remove("two")
        hub.add(one, name="two")
        assert retriever.like("one")[0].score == pytest.approx(1.0, abs=1e-5)


def test_a_damaged_adapter_is_left_out(tmp_path):
    with Hub(tmp_path) as hub:
        for seed, name in enumerate(("one", "two", "three")):
            hub.add(adapter(name, seed))
        next(tmp_path.rglob(f"*{hub.record('two').hash}*")).write_bytes(b"damaged")
        found = Retriever(hub, embedder="hashing").like("one")
    assert [candidate.name for candidate in found] == ["three"]
