from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.errors import AdapterUnsupported, BaseModelMismatch, LayerMismatch, UnknownExpert, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Fingerprint

A = Adapter("a", "base", {"q": factors(0, rank=2), "v": factors(1, rank=1)})
B = Adapter("b", "base", {"v": factors(2, rank=4, bias_O=torch.ones(5))})
C = Adapter("c", "base", {"q": factors(3, rank=3), "v": factors(4, rank=2, gain_O=torch.full((5,), 0.5))})


def test_a_list_keeps_its_order_and_the_adapters_names():
    pool = ExpertPool([C, A, B])
    assert pool.names == ("c", "a", "b")
    assert list(pool) == ["c", "a", "b"]
    assert len(pool) == 3


def test_a_mapping_gives_the_names():
    pool = ExpertPool({"über / α": A, "model.layers.0": A})
    assert pool.names == ("über / α", "model.layers.0")
    assert pool["über / α"] is A


def test_an_iterator_is_read_once():
    assert ExpertPool(adapter for adapter in (A, B)).names == ("a", "b")


def test_a_pool_of_one_is_a_pool():
    assert ExpertPool([A]).names == ("a",)


def test_an_empty_pool_is_refused():
    for nothing in ([], {}):
        with pytest.raises(WeightingError, match="the pool is empty"):
            ExpertPool(nothing)


@pytest.mark.parametrize(("given", "said"), [(3, "not of 3"), (None, "not of None")])
def test_what_holds_no_adapters_is_refused(given, said):
    with pytest.raises(WeightingError, match=f"a list of adapters or of {{name: adapter}}, {said}"):
        ExpertPool(given)


@pytest.mark.parametrize("given", [["x"], [A, "x"], {"a": "x"}, "x"])
def test_what_is_no_adapter_is_refused_by_what_it_is(given):
    with pytest.raises(WeightingError, match="one of them is 'x'"):
        ExpertPool(given)


def test_two_adapters_of_one_name_are_refused_by_name():
    with pytest.raises(WeightingError, match="several adapters named 'a'; pass a mapping"):
        ExpertPool([A, B, dataclasses.replace(C, name="a")])


def test_an_unknown_expert_is_named_with_those_there_are():
    with pytest.raises(UnknownExpert, match="no expert 'x' in the pool; it has 'a', 'b'"):
        ExpertPool([A, B])["x"]


def test_a_subset_has_the_order_asked_for():
    assert ExpertPool([A, B, C]).subset(["c", "a"]).names == ("c", "a")


def test_a_pool_is_frozen_and_replace_makes_another():
    pool = ExpertPool([A, B])
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.adapters = {}
    assert dataclasses.replace(pool, adapters={"z": C}).names == ("z",)


def test_the_mapping_that_made_it_can_change_afterwards():
    named = {"a": A}
    pool = ExpertPool(named)
    named["b"] = B
    assert pool.names == ("a",)


def test_the_layers_are_those_of_any_expert_sorted():
    assert ExpertPool([B, A]).layer_names == ("q", "v")


def test_stacked_rows_are_the_experts_rows_in_order_with_their_owner():
    stack = ExpertPool([A, B, C]).stacked("v")
    assert stack.owner_S.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert torch.equal(stack.a_SI, torch.cat([x.layers["v"].a_RI for x in (A, B, C)], dim=0))
    assert torch.equal(stack.b_OS, torch.cat([x.layers["v"].b_OR for x in (A, B, C)], dim=1))


def test_an_expert_without_the_layer_owns_no_row():
    stack = ExpertPool([A, B, C]).stacked("q")
    assert stack.owner_S.tolist() == [0, 0, 2, 2, 2]
    assert (stack.gain_EO, stack.bias_EO) == (None, None)


def test_gain_and_bias_have_a_row_per_expert_and_zeros_where_one_has_none():
    stack = ExpertPool([A, B, C]).stacked("v")
    assert stack.bias_EO.tolist() == [[0.0] * 5, [1.0] * 5, [0.0] * 5]
    assert stack.gain_EO.tolist() == [[0.0] * 5, [0.0] * 5, [0.5] * 5]


def test_the_stack_times_weights_by_owner_is_the_weighted_sum_of_deltas():
    weights = torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)
    stack = ExpertPool([A, B, C]).stacked("v")
    found = (stack.b_OS.double() * weights[stack.owner_S]) @ stack.a_SI.double()
    deltas = [x.layers["v"].b_OR.double() @ x.layers["v"].a_RI.double() for x in (A, B, C)]
    expected = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_expert_that_is_not_bound_to_a_base_is_refused_by_name_and_layer():
    dora = Adapter("dora", "base", {"q": factors(5, magnitude_O=torch.ones(5))})
    with pytest.raises(AdapterUnsupported, match="'dora' is not bound to a base model in layer 'q'"):
        ExpertPool([A, dora]).stacked("q")


def test_experts_of_contradicting_fingerprints_are_refused_with_both():
    left = dataclasses.replace(A, fingerprint=Fingerprint("left", (1.0,)))
    right = dataclasses.replace(B, base_model="other", fingerprint=Fingerprint("right", (1.0,)))
    with pytest.raises(BaseModelMismatch, match=r"'a' \(for 'base'\) and 'b' \(for 'other'\).*left.*right"):
        ExpertPool([left, right])


def test_an_expert_without_a_fingerprint_contradicts_nobody():
    left = dataclasses.replace(A, fingerprint=Fingerprint("left", (1.0,)))
    assert ExpertPool([left, B]).names == ("a", "b")


def test_a_contradiction_is_found_behind_an_expert_without_a_fingerprint():
    left, right = (dataclasses.replace(x, fingerprint=Fingerprint(x.name)) for x in (A, C))
    with pytest.raises(BaseModelMismatch):
        ExpertPool([B, left, right])


@pytest.mark.parametrize(
    "other",
    [factors(9, num_out=6), factors(9, num_in=8), factors(9, kind="embedding"), factors(9, kind="conv", kernel=(1, 7))],
)
def test_experts_that_update_a_layer_with_other_shapes_are_refused_with_both(other):
    with pytest.raises(LayerMismatch, match=r"'a' and 'x' update layer 'q'.*\(5, 7, 'linear', \(\)\) and "):
        ExpertPool([A, Adapter("x", "base", {"q": other})])


def test_a_pool_including_one_more_has_it_at_its_end_and_checks_it():
    pool = ExpertPool([A, B])
    assert pool.including("c", C).names == ("a", "b", "c")
    assert pool.including("a", C)["a"] is C
    assert pool.names == ("a", "b")
    with pytest.raises(LayerMismatch, match="'a' and 'x' update layer 'q'"):
        pool.including("x", Adapter("x", "base", {"q": factors(9, num_out=6)}))


def test_a_pool_without_one_has_the_others_in_order():
    assert ExpertPool([A, B, C]).without("b").names == ("a", "c")
    with pytest.raises(UnknownExpert, match="no expert 'x' in the pool"):
        ExpertPool([A, B]).without("x")


def test_adapters_of_one_form_share_its_tuple_and_others_do_not():
    other_rank = Adapter("x", "other", {"q": factors(7, rank=9), "v": factors(8, rank=1)})
    assert A.form is other_rank.form
    assert A.form == (("q", 5, 7, "linear", (), True), ("v", 5, 7, "linear", (), True))
    assert C.form is A.form
    unbound = Adapter("x", "base", {"q": factors(7), "v": factors(8, magnitude_O=torch.ones(5))})
    assert unbound.form != A.form


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_and_a_pickle_are_the_pool_again(copied):
    pool = ExpertPool({"x": C, "y": A})
    assert pool.layer_names == ("q", "v")
    again = copied(pool)
    assert (again.names, again.places, again.layer_names, again.lazy) == (pool.names, pool.places, ("q", "v"), False)
    assert torch.equal(again.stacked("v").b_OS, pool.stacked("v").b_OS)
    with pytest.raises(TypeError):
        again.adapters["z"] = B


def test_components_of_rank_one_are_the_singular_ones_strongest_first_and_sum_to_the_expert():
    parts = ExpertPool([A, C]).rank_one()
    assert parts.names == ("a#1", "a#2", "c#1", "c#2", "c#3")
    for whole in (A, C):
        for layer, factors_of in whole.layers.items():
            own = [parts[name].layers.get(layer) for name in parts.names if parts[name].card["part_of"] == whole.name]
            delta = (factors_of.b_OR.double() @ factors_of.a_RI.double()).numpy()
            u, s, vh = np.linalg.svd(delta)
            for place, part in enumerate(part for part in own if part is not None):
                assert part.rank == 1
                expected = s[place] * np.outer(u[:, place], vh[place])
                assert np.allclose((part.b_OR @ part.a_RI).numpy(), expected, atol=1e-5 * s[0])
            assert sum(part is not None for part in own) == factors_of.rank
    gains = [parts[name].layers["v"].gain_O for name in ("c#1", "c#2")]
    assert gains[0].tolist() == [0.5] * 5
    assert gains[1] is None


def test_an_expert_that_needs_its_base_has_no_components():
    unbound = Adapter("d", "base", {"q": factors(0, rank=2, magnitude_O=torch.ones(5))})
    with pytest.raises(AdapterUnsupported, match="bound_pool"):
        ExpertPool([unbound]).rank_one()
