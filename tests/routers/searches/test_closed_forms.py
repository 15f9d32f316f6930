from __future__ import annotations

import math

import pytest
import torch

from loraweave.errors import UnknownExpert, WeightingError
from loraweave.routers.searches.manual import Manual
from loraweave.routers.searches.uniform import Uniform
from loraweave.routers.weights import MixtureWeights

NAMES = ("a", "b/c", "🦙")


def test_the_weights_given_are_the_one_candidate_whatever_their_size():
    candidates = Manual(NAMES, weights={"🦙": -40.0, "a": 2.5}).ask()
    assert [candidate.as_dict() for candidate in candidates] == [{"a": 2.5, "b/c": 0.0, "🦙": -40.0}]


def test_weights_by_layer_are_asked_for_as_they_are():
    by_layer = MixtureWeights(torch.randn(1, 1, 2, 3), NAMES, ("l0", "l1"))
    mixture = Manual(NAMES, weights=by_layer).ask()[0]
    assert mixture.layers == ("l0", "l1")
    assert torch.equal(mixture.values_BTLE, by_layer.values_BTLE)


def test_an_expert_outside_the_pool_is_answered_with_those_in_it():
    with pytest.raises(UnknownExpert, match="'b'"):
        Manual(NAMES, weights={"b": 1.0})


@pytest.mark.parametrize("weight", [math.nan, math.inf, "0.5", 1e60])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(WeightingError, match="'a'"):
        Manual(NAMES, weights={"a": weight})


def test_weights_by_row_are_refused():
    rows = MixtureWeights.of([{"a": 1.0}, None], NAMES)
    with pytest.raises(WeightingError, match="instance scope"):
        Manual(NAMES, weights=rows)


@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_each_expert_gets_its_share_of_1_and_one_evaluation_is_made(num_experts):
    names = [f"expert {number}" for number in range(num_experts)]
    result = Uniform(names, budget=40, seed=3).solve(lambda candidates: [0.25] * len(candidates))
    assert result.weights == pytest.approx(dict.fromkeys(names, 1 / num_experts))
    assert (result.loss, result.evaluations, result.num_trained) == (0.25, 1, 0)


def test_with_groups_layers_outside_them_are_left_alone():
    mixture = Uniform(["a", "b"], groups={"early": ["l0", "l1"]}).ask()[0]
    assert mixture.for_layer("l1").flatten().tolist() == [0.5, 0.5]
    assert mixture.for_layer("l2").flatten().tolist() == [0.0, 0.0]
