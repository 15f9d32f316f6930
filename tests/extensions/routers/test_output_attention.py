"""Attention to the experts' outputs, and scores by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw


@pytest.mark.parametrize("name", ["adapter_fusion", "ramole"])
def test_the_order_of_the_experts_does_not_matter_to_their_weights(name, random_pool, trained_router, x_BTI):
    pool, order = random_pool(*({"q": (rank, 20, 12)} for rank in (4, 2, 30, 1))), [2, 0, 3, 1]
    made, turned = (trained_router(name, each, 0.2) for each in (pool, pool.subset(pool.names[place] for place in order)))
    assert torch.allclose(turned.weights(x_BTI, "q"), made.weights(x_BTI, "q")[..., order], atol=1e-6)


def test_unbound_experts_are_refused_by_name(random_pool):
    pool = random_pool({"q": (4, 20, 12)})
    dora = replace(pool["e0"].layers["q"], magnitude_O=torch.ones(12))
    with pytest.raises(lw.AdapterUnsupported, match="'dora' is not bound"):
        lw.router("spectr", pool.including("dora", lw.Adapter("dora", "tiny", {"q": dora})))
