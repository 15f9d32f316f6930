"""Clusters of a pool, with planted ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.composer.merge.arithmetic import clusters, similarities
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

LAYERS = {"q": (24, 32), "v": (16, 32)}


@pytest.fixture
def pool():
    """Three times three adapters that are one update each but for noise, every one in a gauge of its own."""
    draw = torch.Generator().manual_seed(0)
    adapters = {}
    for group in range(3):
        plain = {n: (torch.randn(4, i, generator=draw), torch.randn(o, 4, generator=draw)) for n, (o, i) in LAYERS.items()}
        for member in range(3):
            layers = {}
            for layer, (a_RI, b_OR) in plain.items():
                gauge_RR = torch.eye(4) * 3 + torch.randn(4, 4, generator=draw)
                noisy_RI = a_RI + 0.1 * torch.randn(a_RI.shape, generator=draw)
                layers[layer] = Factors(gauge_RR @ noisy_RI, b_OR @ torch.linalg.inv(gauge_RR))
            adapters[f"{member} of {group}"] = Adapter(f"{member} of {group}", "tiny", layers=layers)
    order = sorted(adapters)
    return ExpertPool({name: adapters[name] for name in order})


def test_similarities_are_the_cosines_of_the_dense_updates(pool):
    dense = [np.concatenate([a.delta(layer).double().numpy().ravel() for layer in LAYERS]) for a in pool.adapters.values()]
    rows = np.stack([row / np.linalg.norm(row) for row in dense])
    assert np.allclose(similarities(pool), rows @ rows.T, atol=1e-6)


def test_planted_clusters_are_found_whatever_the_gauge_of_the_factors(pool):
    found = clusters(pool, num_clusters=3)
    assert sorted(found) == [tuple(f"{member} of {group}" for member in range(3)) for group in range(3)]
    assert clusters(pool, num_clusters=3, seed=4) == clusters(pool, num_clusters=3, seed=4)


def test_one_cluster_is_the_pool_and_more_than_adapters_are_refused(pool):
    assert clusters(pool, num_clusters=1) == [pool.names]
    with pytest.raises(WeightingError, match="num_clusters is 10, but the pool has 9 adapters"):
        clusters(pool)


def test_an_adapter_that_updates_nothing_is_refused_by_name(pool):
    zero = Adapter("zero", "tiny", layers={"q": Factors(torch.zeros(1, 32), torch.zeros(24, 1))})
    with pytest.raises(WeightingError, match="'zero' updates nothing"):
        clusters(pool.including("zero", zero), num_clusters=2)
