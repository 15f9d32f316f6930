"""The arithmetic of adapters: every operator against dense sums, and the general part of a pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import Make, dense, random_factors
from torch import Tensor, nn

from loraweave.errors import AdapterUnsupported, CompositionError, LayerMismatch, WeightingError
from loraweave.extensions.methods import arithmetic
from loraweave.extensions.methods.arithmetic import genknowsub
from loraweave.hub.adapter import Adapter

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


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(WeightingError, match="takes a list of adapters"):
        arithmetic.negate("a")


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
