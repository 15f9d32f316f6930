"""Adapters as vectors: every operator against dense sums, and pools of differences, clients and clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import Make, dense, random_factors
from torch import Tensor, nn

from loraweave.composer.merge import arithmetic
from loraweave.composer.merge.arithmetic import clusters, genknowsub, similarities
from loraweave.errors import AdapterUnsupported, CompositionError, LayerMismatch, WeightingError
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


def test_negation_changes_the_sign_of_one_factor_only() -> None:
    found = arithmetic.negate(A)
    assert equals(found, {A: -1.0})
    for layer, factors in A.layers.items():
        assert torch.equal(found.layers[layer].a_RI, factors.a_RI)
        assert torch.equal(found.layers[layer].b_OR, -factors.b_OR)


def test_negation_twice_is_the_adapter_bit_for_bit() -> None:
    for given in (A, adapter("d", 4, gain_O=torch.arange(7.0), bias_O=torch.ones(7))):
        once = arithmetic.negate(given)
        assert once.hash != given.hash
        assert arithmetic.negate(once).hash == given.hash


@pytest.mark.parametrize(("part", "word"), [("magnitude_O", "DoRA"), ("base_bias_O", "base bias")])
def test_what_needs_the_base_layer_is_not_negated(part: str, word: str) -> None:
    with pytest.raises(AdapterUnsupported, match=f"'d'.*{word}.*base layer"):
        arithmetic.negate(adapter("d", 4, **{part: torch.ones(7)}))


@pytest.mark.parametrize("part", ["gain_O", "bias_O", "magnitude_O", "base_bias_O"])
def test_scaled_by_one_an_adapter_of_any_kind_is_itself(part: str) -> None:
    given = adapter("d", 4, **{part: torch.arange(7.0)})
    assert arithmetic.scale(given, 1.0).hash == given.hash
    assert arithmetic.add(given).hash == given.hash


def test_every_operator_is_its_sum_of_updates() -> None:
    assert equals(arithmetic.scale(A, -0.3), {A: -0.3})
    assert equals(arithmetic.add(A, B, C), {A: 1.0, B: 1.0, C: 1.0})
    assert equals(arithmetic.subtract(A, B), {A: 1.0, B: -1.0})
    assert equals(arithmetic.analogy(A, B, C), {A: 1.0, B: 1.0, C: -1.0})
    assert equals(arithmetic.unlearn(A, B, 0.4), {A: 1.0, B: -0.4})
    assert equals(arithmetic.subtract_general(A, [B, C]), {A: 1.0, B: -0.5, C: -0.5})


def test_an_adapter_without_itself_is_nothing() -> None:
    assert equals(arithmetic.subtract(A, A), {})
    assert equals(arithmetic.analogy(A, B, B), {A: 1.0})


def test_unlearning_nothing_and_no_general_knowledge_give_the_adapter() -> None:
    assert arithmetic.unlearn(A, B, 0.0).hash == A.hash
    assert arithmetic.subtract_general(A, []).hash == A.hash


def test_the_moving_average_mixes_factors_apart() -> None:
    slow, fast = adapter("slow", 5), adapter("fast", 6)
    found = arithmetic.ema(slow, fast, 0.25)
    for layer in slow.layers:
        x, y = slow.layers[layer], fast.layers[layer]
        assert torch.allclose(found.layers[layer].a_RI, 0.25 * x.a_RI + 0.75 * y.a_RI, rtol=1e-5, atol=1e-6)
        assert torch.allclose(found.layers[layer].b_OR, 0.25 * x.b_OR + 0.75 * y.b_OR, rtol=1e-5, atol=1e-6)
    assert found.name == "slow"
    assert arithmetic.ema(slow, fast, 1.0).hash == slow.hash
    assert arithmetic.ema(slow, fast, 0.0).hash == fast.hash
    with pytest.raises(LayerMismatch, match="average"):
        arithmetic.ema(slow, adapter("fast", 6, 3), 0.5)


def test_results_have_a_recipe_a_report_and_a_name() -> None:
    found = arithmetic.analogy(A, B, C, name="d")
    assert found.name == "d"
    parents = {parent["name"]: parent["weight"] for parent in found.card["recipe"]["parents"]}
    assert parents == {"a": 1.0, "b": 1.0, "c": -1.0}
    assert found.report["one"].rank_out == 3
    assert arithmetic.negate(A).name == "negated a"


def test_trained_heads_need_a_choice() -> None:
    head = torch.ones(2, 2)
    given = replace(A, heads={"score.weight": head})
    with pytest.raises(CompositionError, match="heads"):
        arithmetic.negate(given)
    kept = arithmetic.negate(given, heads="first")
    assert torch.equal(kept.heads["score.weight"], head)
    assert arithmetic.negate(kept, heads="first").hash == given.hash


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: arithmetic.unlearn(A, B, -1.0), "strength"),
        (lambda: arithmetic.unlearn(A, B, math.nan), "strength"),
        (lambda: arithmetic.ema(A, A, 1.5), "decay"),
        (lambda: arithmetic.ema(A, A, math.nan), "decay"),
        (lambda: arithmetic.unlearn(A, B, "x"), "strength='x'"),
        (lambda: arithmetic.unlearn(A, B, None), "strength=None"),
        (lambda: arithmetic.ema(A, A, "x"), "decay='x'"),
        (lambda: arithmetic.scale(A, math.nan), "finite"),
        (lambda: arithmetic.scale(A, 0.0), "zero"),
        (lambda: arithmetic.add(), "one adapter or more"),
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


@torch.no_grad()
def test_a_negated_adapter_undoes_the_adapter_in_a_model(tiny_llama: nn.Module, make_adapter: Make) -> None:
    from loraweave.composer.composer import Composer

    given = make_adapter(tiny_llama, "a", seed=1)
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    base = tiny_llama(**inputs).logits
    opposite = replace(arithmetic.negate(given), base_model=given.base_model)
    with Composer(tiny_llama, [given, opposite]).activate({"a": 1.0, "negated a": 1.0}):
        assert torch.allclose(tiny_llama(**inputs).logits, base, atol=1e-5)


def test_the_mean_of_the_general_updates_is_subtracted_from_each(make_model, make_adapter):
    model = make_model("llama")
    tasks = [make_adapter(model, f"task {n}", rank=2, targets=("q_proj", "v_proj"), seed=n) for n in range(3)]
    generals = [make_adapter(model, f"general {n}", rank=3 + n, targets=("q_proj",), seed=9 + n) for n in range(2)]
    pool = genknowsub(tasks, generals, progress=False)
    assert pool.names == ("task 0", "task 1", "task 2")
    for task in tasks:
        for layer in task.layers:
            mean_OI = sum(g.delta(layer).double() for g in generals if layer in g.layers) / 2
            expected_OI = task.delta(layer).double() - mean_OI
            assert torch.allclose(pool[task.name].delta(layer).double(), expected_OI, atol=1e-5)


def test_without_general_adapters_it_says_so(make_model, make_adapter):
    task = make_adapter(make_model("llama"), "task", rank=2, targets=("q_proj",), seed=0)
    with pytest.raises(WeightingError, match="got none"):
        genknowsub([task], [])


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
