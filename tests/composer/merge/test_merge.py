"""merge: adapters in, one adapter out, by the stated formula; heads are never summed or dropped without a word."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import random_factors
from torch import Tensor

from loraweave.composer.merge.merge import merge, worth_a_thread
from loraweave.composer.merge.method_call import DenseUpdate
from loraweave.composer.merge.methods.linear import linear
from loraweave.errors import (
    AdapterUnsupported,
    BaseModelMismatch,
    CompositionError,
    InvalidLicense,
    LayerMismatch,
    ScopeError,
    UnknownName,
    WeightingError,
)
from loraweave.hub.adapter import Adapter
from loraweave.hub.merge_report import interference
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router
from loraweave.types import Factors, Fingerprint

Q, V = "layers.0.q", "layers.0.v"


def adapter(name: str, seed: int, *, rank: int = 3, layers: tuple[str, ...] = (Q, V), **parts: Tensor) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter(name, "tiny", {layer: random_factors(draw, rank, **parts) for layer in layers})


def weighted(adapters: list[Adapter], weights: list[float], layer: str) -> Tensor:
    """sum of w_e b_e a_e, written out."""
    dense = torch.zeros(5, 7, dtype=torch.float64)
    for each, weight in zip(adapters, weights, strict=True):
        if layer in each.layers:
            dense += weight * each.layers[layer].b_OR.double() @ each.layers[layer].a_RI.double()
    return dense


def test_linear_is_the_weighted_sum_of_updates_whatever_the_ranks_and_layers() -> None:
    adapters = [adapter("a", 0, rank=1), adapter("b", 1, rank=4, layers=(Q,)), adapter("c", 2, layers=(V,))]
    weights = [0.7, -0.4, 2.0]
    merged = merge(adapters, weights)
    assert set(merged.layers) == {Q, V}
    for layer in (Q, V):
        assert torch.allclose(merged.delta(layer).double(), weighted(adapters, weights, layer), rtol=1e-5, atol=1e-5)
    assert merged.layers[Q].rank == 5


def test_the_order_of_adapters_does_not_change_a_bit() -> None:
    pairs = [(adapter("a", 0), 0.7), (adapter("b", 1), -0.4), (adapter("c", 2), 1.3)]
    hashes = {merge(*map(list, zip(*order, strict=True))).hash for order in itertools.permutations(pairs)}
    assert len(hashes) == 1


@pytest.mark.parametrize("method", ["linear", "factor_sum"])
def test_one_hot_weights_give_that_adapter(method: str) -> None:
    a, b = adapter("a", 0), adapter("b", 1)
    assert merge([a, b], [0.0, 1.0], method=method).hash == b.hash


def test_rank_cuts_to_the_best_approximation_and_reports_its_error() -> None:
    adapters, weights = [adapter("a", 0), adapter("b", 1, layers=(Q,), rank=1)], [0.7, -0.4]
    merged = merge(adapters, weights, rank=2)
    dense = weighted(adapters, weights, Q)
    u, s, vh = torch.linalg.svd(dense)
    best = u[:, :2] * s[:2] @ vh[:2]
    assert torch.allclose(merged.delta(Q).double(), best, rtol=1e-5, atol=1e-5)
    report = merged.card["report"][Q]
    assert (report["rank_in"], report["rank_out"]) == (4, 2)
    assert report["relative_error"] == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-5)


def test_without_a_cut_the_reported_error_is_zero() -> None:
    report = merge([adapter("a", 0), adapter("b", 1)], [1.0, 1.0]).report
    assert {layer: (row.rank_in, row.rank_out, row.relative_error) for layer, row in report.items()} == dict.fromkeys(
        (Q, V), (6, 6, 0.0)
    )


def test_the_recipe_names_the_parents_that_count() -> None:
    a, b, c = adapter("a", 0), adapter("b", 1), adapter("c", 2)
    recipe = json.loads(json.dumps(merge([a, b, c], [0.7, 0.0, -0.4], rank=4, seed=3).card["recipe"]))
    assert sorted(recipe.pop("parents"), key=lambda parent: parent["name"]) == [
        {"hash": a.hash, "name": "a", "weight": 0.7, "method": "linear", "license": "unknown"},
        {"hash": c.hash, "name": "c", "weight": -0.4, "method": "linear", "license": "unknown"},
    ]
    assert recipe == {"method": "linear", "options": {}, "seed": 3, "rank": 4}


def test_base_model_and_fingerprint_are_kept() -> None:
    mark = Fingerprint("shapes")
    merged = merge([replace(adapter("a", 0), fingerprint=mark), adapter("b", 1)], [1.0, 1.0], name="both")
    assert (merged.name, merged.base_model, merged.fingerprint) == ("both", "tiny", mark)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 adapters and 1 weights"),
        ([1.0, 1.0, 1.0], "2 adapters and 3 weights"),
        ([float("nan"), 1.0], "'a' is nan"),
        ([1.0, float("-inf")], "'b' is -inf"),
        ([0.0, 0.0], "all 2 weights are zero"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: list[float], message: str) -> None:
    with pytest.raises(WeightingError, match=message):
        merge([adapter("a", 0), adapter("b", 1)], weights)


def test_no_adapters_are_refused() -> None:
    with pytest.raises(WeightingError, match="no adapters"):
        merge([], [])


def test_a_rank_that_no_layer_can_have_is_refused() -> None:
    with pytest.raises(WeightingError, match=f"rank=6 is above 5.*{Q}"):
        merge([adapter("a", 0)], [1.0], rank=6)


def test_two_different_adapters_of_one_name_are_refused_and_one_given_twice_is_not() -> None:
    with pytest.raises(WeightingError, match="two different adapters are named 'a'"):
        merge([adapter("a", 0), adapter("a", 1)], [1.0, 1.0])
    twice = merge([adapter("a", 0), adapter("a", 0)], [0.5, 0.5])
    assert torch.allclose(twice.delta(Q), adapter("a", 0).delta(Q), atol=1e-5)


def test_adapters_that_name_different_bases_without_a_fingerprint_are_refused() -> None:
    with pytest.raises(BaseModelMismatch, match=r"'a' .for 'tiny'. and 'b' .for 'large'."):
        merge([adapter("a", 0), replace(adapter("b", 1), base_model="large")], [1.0, 1.0])


def test_a_sum_beyond_what_fp32_holds_is_refused() -> None:
    huge = Adapter("huge", "tiny", {Q: Factors(torch.ones(1, 7), torch.full((5, 1), 3e38))})
    with pytest.raises(CompositionError, match=f"NaN or infinite.*{Q}"):
        merge([huge], [10.0])


def test_a_dense_result_is_exact_without_a_rank_and_cut_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(experts: list[Factors], weights: list[float]) -> DenseUpdate:
        return DenseUpdate((experts[0].b_OR @ experts[0].a_RI).square(), torch.ones(5))

    monkeypatch.setattr("loraweave.registry.get", lambda folder, name: squared)
    wanted = adapter("a", 0).delta(Q).square()
    exact, cut = merge([adapter("a", 0)], [1.0], method="squared"), merge([adapter("a", 0)], [1.0], method="squared", rank=2)
    assert torch.equal(exact.delta(Q), wanted)
    assert torch.equal(exact.layers[Q].bias_O, torch.ones(5))
    u, s, vh = torch.linalg.svd(wanted.double())
    assert torch.allclose(cut.delta(Q).double(), u[:, :2] * s[:2] @ vh[:2], atol=1e-5)
    row = cut.report[Q]
    assert (row.rank_in, row.rank_out) == (5, 2)
    assert row.relative_error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)


def test_svd_without_a_rank_keeps_the_largest_of_the_adapters_and_says_what_that_cost() -> None:
    merged = merge([adapter("a", 0, rank=1), adapter("b", 1, rank=3)], [1.0, 1.0], method="svd")
    dense = weighted([adapter("a", 0, rank=1), adapter("b", 1, rank=3)], [1.0, 1.0], Q)
    sigma = torch.linalg.svdvals(dense)
    row = merged.report[Q]
    assert (row.rank_in, row.rank_out) == (4, 3)
    assert row.relative_error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)


def test_unknown_methods_and_options_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        merge([adapter("a", 0)], [1.0], method="liner")
    with pytest.raises(WeightingError, match="'linear' has no option 'density'"):
        merge([adapter("a", 0)], [1.0], density=0.2)


def test_adapters_for_different_bases_are_refused() -> None:
    a, b = (replace(adapter(n, 0), fingerprint=Fingerprint(n)) for n in "ab")
    with pytest.raises(BaseModelMismatch, match=r"'a'.*'b'"):
        merge([a, b], [1.0, 1.0])


def test_different_shapes_are_refused() -> None:
    odd = Adapter("odd", "tiny", {Q: Factors(torch.ones(1, 6), torch.ones(5, 1))})
    with pytest.raises(LayerMismatch, match=f"'a'.*'odd'.*{Q}"):
        merge([adapter("a", 0), odd], [1.0, 1.0])


def test_an_unbound_adapter_is_named_with_its_layer() -> None:
    with pytest.raises(AdapterUnsupported, match=f"{Q}.*'d'.*DoRA"):
        merge([adapter("d", 0, magnitude_O=torch.ones(5))], [0.5])


def test_a_merge_of_a_merge_is_a_merge() -> None:
    a, b, c = adapter("a", 0), adapter("b", 1), adapter("c", 2)
    nested = merge([merge([a, b], [0.5, 2.0]), c], [-1.0, 0.3])
    assert torch.allclose(nested.delta(Q).double(), weighted([a, b, c], [-0.5, -2.0, 0.3], Q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "svd", "slerp"])
def test_without_weights_all_have_equal_shares(method: str) -> None:
    adapters = [adapter("a", 0), adapter("b", 1)]
    found, expected = merge(adapters, method=method), merge(adapters, [0.5, 0.5], method=method)
    assert found.hash == expected.hash
    assert torch.allclose(
        merge([*adapters, adapter("c", 2)]).delta(Q).double(),
        weighted([*adapters, adapter("c", 2)], [1 / 3] * 3, Q),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_router_is_no_weights_to_merge_by(tiny_llama, make_adapters) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    with pytest.raises(ScopeError, match="cannot merge by Arrow: merge takes one number for each adapter"):
        merge(adapters, router("arrow", ExpertPool(adapters)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (ExpertPool([adapter("a", 0)]), "ExpertPool"),
        ({"a": adapter("a", 0)}, "dict"),
        (torch.nn.Linear(2, 2), "Linear"),
        ([torch.nn.Linear(2, 2)], "Linear"),
        (["a"], "'a'"),
        (None, "None"),
    ],
)
def test_what_is_no_list_of_adapters_says_how_to_come_by_one(given: object, shown: str) -> None:
    with pytest.raises(WeightingError, match=rf"not {shown}: of a pool .* of an expert model its adapter\(\)"):
        merge(given, [1.0])  # type: ignore[arg-type]


def test_a_merge_keeps_the_files_that_all_parents_share_and_names_those_of_each() -> None:
    def one(name: str, seed: int, head: bytes) -> Adapter:
        return replace(adapter(name, seed), files={"tokenizer.json": b"{}", "value_head.safetensors": head})

    merged = merge([one("a", 0, b"one"), one("b", 1, b"other")], [0.5, 0.5])
    assert dict(merged.files) == {"tokenizer.json": b"{}"}
    assert [parent["files"] for parent in merged.card["recipe"]["parents"]] == [
        ["tokenizer.json", "value_head.safetensors"]
    ] * 2
    assert sorted(merge([one("a", 0, b"one")], [1.0]).files) == ["tokenizer.json", "value_head.safetensors"]


HEAD = "score.weight"


def headed(name: str, seed: int, head: Tensor) -> Adapter:
    return replace(adapter(name, seed), heads={HEAD: head})


ONES, TWOS = torch.ones(2, 5), torch.full((2, 5), 2.0)


def test_a_head_is_refused_by_name_unless_the_user_chooses() -> None:
    with pytest.raises(CompositionError, match=r"'score.weight' in 'b'.*heads='first'"):
        merge([adapter("a", 0), headed("b", 1, ONES)], [1.0, 1.0])


def test_one_adapter_of_weight_one_keeps_its_head() -> None:
    a = headed("a", 0, ONES)
    assert merge([a], [1.0]).hash == a.hash


def test_one_adapter_of_another_weight_needs_a_choice() -> None:
    with pytest.raises(CompositionError, match=HEAD):
        merge([headed("a", 0, ONES)], [0.5])


def test_first_is_the_first_in_the_order_given() -> None:
    a, b = headed("a", 0, ONES), headed("b", 1, TWOS)
    assert torch.equal(merge([a, b], [1.0, 1.0], heads="first").heads[HEAD], ONES)
    assert torch.equal(merge([b, a], [1.0, 1.0], heads="first").heads[HEAD], TWOS)


def test_average_weighs_those_that_have_the_head() -> None:
    merged = merge([headed("a", 0, ONES), headed("b", 1, TWOS), adapter("c", 2)], [1.0, 3.0, 5.0], heads="average")
    assert torch.allclose(merged.heads[HEAD], torch.full((2, 5), 1.75))


def test_an_average_that_does_not_exist_is_refused() -> None:
    a, b = headed("a", 0, ONES), headed("b", 1, torch.ones(3, 5))
    with pytest.raises(LayerMismatch, match=r"\(2, 5\) in 'a' and \(3, 5\) in 'b'"):
        merge([a, b], [1.0, 1.0], heads="average")
    with pytest.raises(WeightingError, match="sum to 0"):
        merge([a, replace(b, heads={HEAD: TWOS})], [1.0, -1.0], heads="average")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(WeightingError, match="heads='last'"):
        merge([adapter("a", 0)], [1.0], heads="last")


def test_the_recipe_says_what_was_chosen() -> None:
    merged = merge([headed("a", 0, ONES), adapter("b", 1)], [1.0, 1.0], heads="first")
    assert merged.card["recipe"]["heads"] == "first"


factors = partial(random_factors, num_out=11, num_in=7)


def weighted_delta(update: Factors, weight: float) -> torch.Tensor:
    return weight * update.b_OR.double() @ update.a_RI.double()


def test_norms_and_cosines_are_those_of_the_weighted_dense_updates() -> None:
    experts, weights = [factors(0), factors(1, rank=1), factors(2, rank=5)], [0.7, -0.4, 2.0]
    found = interference(experts, weights)
    updates = [weighted_delta(f, w) for f, w in zip(experts, weights, strict=True)]
    assert found.norms == pytest.approx([float(d.norm()) for d in updates], rel=1e-5)
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = [float((updates[i] * updates[j]).sum() / updates[i].norm() / updates[j].norm()) for i, j in pairs]
    assert found.cosines == pytest.approx(wanted, abs=1e-6)


def test_the_sign_conflict_is_the_share_of_entries_with_both_signs() -> None:
    experts, weights = [factors(0), factors(1), factors(2)], [1.0, -1.0, 0.5]
    signs = torch.stack([weighted_delta(f, w).sign() for f, w in zip(experts, weights, strict=True)])
    wanted = float(((signs > 0).any(0) & (signs < 0).any(0)).double().mean())
    assert interference(experts, weights).sign_conflict == pytest.approx(wanted)


def test_entries_that_nobody_touches_do_not_count() -> None:
    left = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    right = Factors(torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    # entries: (1 and -1), (0 and 1), and a row of zeros
    assert interference([left, right], [1.0, 1.0]).sign_conflict == 0.5


def test_large_layers_are_sampled_close_to_the_truth() -> None:
    experts = [factors(seed, num_out=300, num_in=410) for seed in range(2)]
    opposite = (weighted_delta(experts[0], 1.0) * weighted_delta(experts[1], 1.0) < 0).double().mean()
    assert interference(experts, [1.0, 1.0]).sign_conflict == pytest.approx(float(opposite), abs=0.02)


def test_an_absent_expert_and_a_zero_update_have_no_norm_and_no_cosine() -> None:
    zero = Factors(torch.zeros(2, 7), torch.zeros(11, 2))
    found = interference([factors(0), None, zero], [1.0, 1.0, 1.0])
    assert found.norms[1:] == (0.0, 0.0)
    assert found.cosines == (0.0, 0.0, 0.0)


def test_one_expert_conflicts_with_nobody() -> None:
    found = interference([factors(0)], [1.0])
    assert (found.cosines, found.sign_conflict) == ((), 0.0)


def test_only_a_copy_of_an_adapter_whose_license_forbids_derived_works_needs_no_permission() -> None:
    one = replace(adapter("a", 0), card={"license": "CC-BY-ND-4.0"})
    assert merge([one], [1.0]).card["license"] == "CC-BY-ND-4.0"
    derived = [
        partial(merge, [one], [2.0]),
        partial(merge, [one], [1.0], rank=2),
        partial(merge, [one], [1.0], method="ties"),
        partial(merge, [one, adapter("b", 1)], [1.0, 1.0]),
    ]
    for work in derived:
        with pytest.raises(InvalidLicense, match=r"'a' is under CC-BY-ND-4\.0, which permits no work derived from it"):
            work()
        assert work(allow_licenses=True).card["license"].startswith("CC-BY-ND-4.0")


def test_a_merge_by_a_function_has_the_functions_name() -> None:
    merged = merge([adapter("a", 0), adapter("b", 1)], [0.5, 0.5], method=linear)
    assert merged.card["recipe"]["method"] == merged.report.method == "linear"


def test_a_layer_whose_cut_takes_more_than_ten_million_products_is_merged_beside_others_unless_it_is_large():
    def update(rank, outputs=7, inputs=4):
        return Factors(torch.zeros(rank, inputs), torch.zeros(outputs, rank))

    # of s rank rows, s^2 (O + I)
    assert worth_a_thread([update(900), None, update(100)])
    assert not worth_a_thread([update(900), update(50)])
    assert not worth_a_thread([update(900, outputs=2**11, inputs=2**11 + 1)])
