"""The figures of a mixture that the page shows, against the updates themselves."""

from __future__ import annotations

import pytest
import torch

from loraweave.extensions.ui.workbench import mixture_interference


def test_a_mixture_that_nobody_merges_is_compared_layer_by_layer(tiny_llama, make_adapter):
    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")]
    first, second, *_ = adapters[0].layers
    report = mixture_interference({one.name: one.layers for one in adapters}, {first: [1.0, -2.0], second: [0.5, 0.0]})
    assert (report.names, report.weights) == (("a", "b"), (0.75, -1.0))
    for layer, weights in ((first, (1.0, -2.0)), (second, (0.5, 0.0))):
        updates = [weight * adapter.delta(layer).double() for weight, adapter in zip(weights, adapters, strict=True)]
        assert report[layer].norms == pytest.approx([float(update.norm()) for update in updates], rel=1e-5)
    opposed = [sign * adapter.delta(first).double().flatten() for sign, adapter in zip((1, -1), adapters, strict=True)]
    assert report[first].cosines == pytest.approx([float(torch.cosine_similarity(*opposed, dim=0))], abs=1e-5)
    assert report[second].cosines == (0.0,)
