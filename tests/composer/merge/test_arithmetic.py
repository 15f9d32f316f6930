"""What is made of adapters as vectors: clients, clusters and common parts, against dense sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import dense, random_factors
from torch import Tensor

from loraweave.composer.merge import arithmetic
from loraweave.composer.merge.arithmetic import clusters, similarities
from loraweave.errors import LayerMismatch, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

SHAPES = {"one": (5, 7), "two": (6, 4), "three": (3, 3)}


def adapter(name: str, seed: int, rank: int = 2, layers: tuple[str, ...] = ("one", "two"), **parts: Tensor) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        cut = {part: tensor[: SHAPES[layer][0]] for part, tensor in parts.items()}
        factors[layer] = random_factors(draw, rank, *SHAPES[layer], **cut)
    return Adapter(name, "base", factors)


def equals(found: Adapter, weights: dict[Adapter, float]) -> bool:
    for layer, shape in SHAPES.items():
        wanted = torch.zeros(shape).double()
        for each, weight in weights.items():
            wanted += weight * dense(each.layers[layer]) if layer in each.layers else 0.0
        got = dense(found.layers[layer]) if layer in found.layers else torch.zeros(shape).double()
        if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-5):
            return False
    return True


A, B, C = adapter("a", 1), adapter("b", 2, 3, ("two", "three")), adapter("c", 3, 1, ("one", "three"))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: arithmetic.byom(A, 0), "rank=0"),
        (lambda: arithmetic.compeft(A, density=0.0), "density=0.0"),
        (lambda: arithmetic.compeft(A, density=1.1), "density=1.1"),
        (lambda: arithmetic.compeft(A, density=math.nan), "density=nan"),
        (lambda: arithmetic.compeft(A, scale=0), "scale=0"),
        (lambda: arithmetic.compeft(A, scale="best"), "scale='best'"),
        (lambda: arithmetic.compeft(A, per="layer"), "per='layer'"),
    ],
)
def test_numbers_out_of_range_are_refused(call: Callable[[], Adapter], word: str) -> None:
    with pytest.raises(WeightingError, match=word):
        call()


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
    monkeypatch.setattr(arithmetic, "BLOCK", 4)
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


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_twin_merging_parts_are_the_common_one_and_the_best_cuts_of_the_differences_to_it(rank: int) -> None:
    told = {"description": "counts", "examples": ["one"], "other": 1}
    experts = {"a": replace(adapter("a", 1), card=told), "b": adapter("b", 2)}
    shared = adapter("common", 3, rank=1)
    parts = arithmetic.twin_merging(experts, shared, rank=rank)
    assert parts.names == ("shared", "a", "b")
    assert [parts[name].name for name in parts.names] == ["shared", "a", "b"]
    assert equals(parts["shared"], {shared: 1.0})
    for name, expert in experts.items():
        for layer in ("one", "two"):
            difference = dense(expert.layers[layer]) - dense(shared.layers[layer])
            u, sigma, vh = torch.linalg.svd(difference, full_matrices=False)
            wanted = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
            assert torch.allclose(dense(parts[name].layers[layer]), wanted, rtol=1e-5, atol=1e-5)
    assert [parts["a"].card[key] for key in ("description", "examples")] == ["counts", ["one"]]
    assert "other" not in parts["a"].card
    with pytest.raises(WeightingError, match="has an expert of that name"):
        arithmetic.twin_merging({**experts, "shared": shared}, shared)
    with pytest.raises(WeightingError, match="rank"):
        arithmetic.twin_merging(experts, shared, rank=0)
