from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraweave.errors import ScopeError, UnknownExpert, WeightingError
from loraweave.routers.weights import MixtureWeights, Router

EXPERTS = ("a", "b", "c")


def mixture(rows=1, tokens=1, layers=(), experts=EXPERTS):
    shape = (rows, tokens, max(len(layers), 1), len(experts))
    generator = torch.Generator().manual_seed(0)
    return MixtureWeights(torch.randn(shape, generator=generator), experts, layers)


def test_a_mapping_is_one_row_with_zeros_for_those_not_named():
    found = MixtureWeights.of({"c": 0.5, "a": -2.0}, EXPERTS)
    assert found.values_BTLE.tolist() == [[[[-2.0, 0.0, 0.5]]]]
    assert (found.experts, found.layers, found.scope) == (EXPERTS, (), "task")


def test_a_list_is_a_mapping_per_row_and_none_the_base():
    found = MixtureWeights.of([{"a": 1.0}, None, {"b": 0.25, "c": 3.0}, {}], EXPERTS)
    assert found.values_BTLE[:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0.25, 3], [0, 0, 0]]
    assert found.scope == "instance"


def test_an_empty_mapping_is_the_base():
    assert not MixtureWeights.of({}, EXPERTS).values_BTLE.any()


def test_mixture_weights_pass_through_themselves():
    weights = mixture()
    assert MixtureWeights.of(weights, EXPERTS) is weights


@given(st.dictionaries(st.sampled_from(EXPERTS), st.floats(-1e6, 1e6, width=32)))
@settings(max_examples=50, deadline=None)
def test_as_dict_gives_back_what_of_was_given(given_weights):
    expected = {name: given_weights.get(name, 0.0) for name in EXPERTS}
    assert MixtureWeights.of(given_weights, EXPERTS).as_dict() == expected


def test_an_unknown_expert_is_named_with_those_there_are():
    with pytest.raises(UnknownExpert, match="no expert 'd' in the pool; it has 'a', 'b', 'c'"):
        MixtureWeights.of([{"a": 1.0}, {"d": 1.0}], EXPERTS)


def test_a_near_miss_of_an_experts_name_is_named():
    with pytest.raises(UnknownExpert, match="no expert 'Sentimet' in the pool, did you mean 'sentiment'"):
        MixtureWeights.of({"Sentimet": 1.0}, ("antonym", "sentiment"))


def test_the_names_of_a_large_pool_are_not_all_listed():
    with pytest.raises(UnknownExpert, match="and 992 more") as caught:
        MixtureWeights.of({"zzz": 1.0}, tuple(f"expert {n}" for n in range(1000)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("weight", [None, "0.5", "much", [1.0], 1e300, -1e39, 10**400, {"a": 1.0}, torch.ones(2)])
def test_a_weight_that_is_no_number_is_named(weight):
    with pytest.raises(WeightingError, match=r"weight of expert 'b' is .*not a number that fp32 holds"):
        MixtureWeights.of([{"a": 1.0}, {"b": weight}], EXPERTS)


@pytest.mark.parametrize("weight", [1, np.float32(1.0), torch.tensor(1.0), torch.tensor([1.0])])
def test_numbers_of_every_library_are_weights(weight):
    assert MixtureWeights.of({"b": weight}, EXPERTS).values_BTLE.flatten().tolist() == [0.0, 1.0, 0.0]


def test_a_weight_that_learns_is_not_cut_off_without_a_word():
    with pytest.raises(WeightingError, match=r"expert 'a' is to be learned.*give MixtureWeights"):
        MixtureWeights.of({"a": torch.ones((), requires_grad=True)}, EXPERTS)


@pytest.mark.parametrize("row", [0.5, "a", ("a", 1.0)])
def test_a_row_that_is_no_mapping_is_named(row):
    with pytest.raises(WeightingError, match="row 1 of the mixtures is"):
        MixtureWeights.of([{"a": 1.0}, row], EXPERTS)


def test_a_list_without_rows_is_refused():
    with pytest.raises(WeightingError, match="empty list"):
        MixtureWeights.of([], EXPERTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_expert_and_place(value):
    with pytest.raises(WeightingError, match=r"expert 'b' at \(B, T, L\) \(1, 0, 0\) is .*(nan|inf)"):
        MixtureWeights.of([{}, {"b": value}], EXPERTS)


@pytest.mark.parametrize(("shape", "found"), [((3,), r"\(3,\)"), ((1, 1, 3), r"\(1, 1, 3\)"), ((1, 1, 1, 1, 3), "shape")])
def test_values_without_four_axes_are_refused(shape, found):
    with pytest.raises(WeightingError, match=f"four axes B, T, L, E.*{found}"):
        MixtureWeights(torch.zeros(shape), EXPERTS)


def test_values_for_another_number_of_experts_are_refused_with_both():
    with pytest.raises(WeightingError, match="2 experts on their last axis, but 3 names"):
        MixtureWeights(torch.zeros(1, 1, 1, 2), EXPERTS)


@pytest.mark.parametrize(("size", "layers"), [(2, ()), (2, ("q",)), (1, ("q", "v")), (3, ("q", "v"))])
def test_values_for_another_number_of_layers_are_refused_with_both(size, layers):
    with pytest.raises(WeightingError, match=f"{size} layers on their axis L, but {len(layers)} names"):
        MixtureWeights(torch.zeros(1, 1, size, 3), EXPERTS, layers)


@pytest.mark.parametrize(("rows", "tokens", "scope"), [(1, 1, "task"), (2, 1, "instance"), (1, 5, "token"), (3, 7, "token")])
def test_the_scope_follows_from_the_axes(rows, tokens, scope):
    assert mixture(rows, tokens).scope == scope


def test_layers_that_share_weights_all_get_them():
    weights = mixture(2, 3)
    for layer in ("q", "anything"):
        assert torch.equal(weights.for_layer(layer), weights.values_BTLE[:, :, 0])


@given(st.integers(1, 3), st.integers(1, 5), st.lists(st.sampled_from("qkvo"), min_size=1, unique=True))
@settings(max_examples=25, deadline=None)
def test_a_layer_gets_its_own_slice_and_an_unnamed_one_zeros(rows, tokens, layers):
    weights = mixture(rows, tokens, tuple(layers))
    values = weights.values_BTLE.numpy()
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(weights.for_layer(layer), values[:, :, index])
    assert weights.for_layer("other").shape == (rows, tokens, 3)
    assert not weights.for_layer("other").any()


def test_it_is_a_router_that_does_not_look_at_its_input():
    weights = mixture(1, 1, ("q", "v"))
    assert isinstance(weights, Router)
    assert torch.equal(weights.weights(torch.randn(2, 5, 7), "v"), weights.for_layer("v"))


@pytest.mark.parametrize(
    ("weights", "message"), [(mixture(2), "instance"), (mixture(1, 2), "token"), (mixture(1, 1, ("q",)), "1")]
)
def test_only_a_task_scope_mixture_that_layers_share_is_one_mapping(weights, message):
    with pytest.raises(ScopeError, match=message):
        weights.as_dict()


def test_it_is_frozen_and_replace_checks_again():
    weights = mixture()
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.experts = ()
    with pytest.raises(WeightingError):
        dataclasses.replace(weights, experts=("a", "b"))


def test_weights_by_layer_are_read_back_and_averaged():
    nested = {"q": {"a": 0.5, "b": -1.0}, "v": {"b": 2.0, "a": 0.0}}
    mixture = MixtureWeights.of_layers(nested, ["a", "b"])
    assert mixture.for_layer("v").tolist() == [[[0.0, 2.0]]]
    assert mixture.by_layer() == nested
    assert mixture.means() == {"a": 0.25, "b": 0.5}
    with pytest.raises(ScopeError, match="are not by layer"):
        MixtureWeights.of({"a": 1.0}, ["a"]).by_layer()
    with pytest.raises(ScopeError, match="instance scope"):
        MixtureWeights.of([{"a": 1.0}, None], ["a"]).means()
