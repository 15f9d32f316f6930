"""Groups of similar adapters, against the cosines of dense updates and planted groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from warm_workers import warm_workers as warm_workers

import loraweave as lw
from loraweave.errors import LayerMismatch, WeightingError
from loraweave.extensions.expert_training import grouping
from loraweave.extensions.expert_training.grouping import clusters, similarities
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
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
    names, cosines = similarities(pool)
    assert names == pool.names
    assert np.allclose(cosines, rows @ rows.T, atol=1e-6)


@pytest.mark.usefixtures("warm_workers")
def test_workers_compare_the_blocks_of_a_hub_or_a_pool_to_the_bits_of_one_process(pool, tmp_path, monkeypatch, capfd):
    dense = [np.concatenate([a.delta(layer).double().numpy().ravel() for layer in LAYERS]) for a in pool.adapters.values()]
    rows = np.stack([row / np.linalg.norm(row) for row in dense])
    monkeypatch.setattr(grouping, "BLOCK", 4)
    alone = similarities(pool, progress=False)[1]
    assert capfd.readouterr().out == ""
    assert np.allclose(alone, rows @ rows.T, atol=1e-6)
    assert np.array_equal(similarities(pool, n_jobs=2)[1], alone)
    with Hub(tmp_path / "hub") as hub:
        for each in pool.adapters.values():
            hub.add(each)
        names, found = similarities(hub, n_jobs=2)
        assert tuple(names) == pool.names
        assert np.array_equal(found, alone)
        assert clusters(hub, num_clusters=3) == clusters(pool, num_clusters=3)
        hub.add(Adapter("other", "tiny", layers={"q": Factors(torch.ones(1, 5), torch.ones(24, 1))}))
        with pytest.raises(LayerMismatch, match="'q'"):
            clusters(hub, num_clusters=3)


def test_planted_clusters_are_found_whatever_the_gauge_of_the_factors(pool):
    found = clusters(pool, num_clusters=3)
    assert sorted(found) == [tuple(f"{member} of {group}" for member in range(3)) for group in range(3)]
    assert clusters(pool, num_clusters=3, seed=4) == clusters(pool, num_clusters=3, seed=4)


def test_one_cluster_is_the_pool_and_more_than_adapters_are_refused(pool):
    assert clusters(pool, num_clusters=1) == [pool.names]
    adapters = list(pool.adapters.values())
    assert clusters(adapters, num_clusters=3) == clusters(pool, num_clusters=3)
    with pytest.raises(WeightingError, match="num_clusters is 10, but the pool has 9 adapters"):
        clusters(pool)


def test_an_adapter_that_updates_nothing_is_refused_by_name(pool):
    zero = Adapter("zero", "tiny", layers={"q": Factors(torch.zeros(1, 32), torch.zeros(24, 1))})
    with pytest.raises(WeightingError, match="'zero' updates nothing"):
        clusters(pool.including("zero", zero), num_clusters=2)


def test_grouping_adapters_shows_no_bar_since_no_argument_could_leave_it_out(make_model, make_adapter, monkeypatch, capfd):
    monkeypatch.setattr(grouping, "BLOCK", 2)
    model = make_model("llama")
    pool = [make_adapter(model, name, seed=seed) for seed, name in enumerate("abcde")]
    with lw.experts("mixtral", model, pool=pool, num_experts=2):
        assert capfd.readouterr().out == ""
