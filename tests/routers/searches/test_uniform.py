from __future__ import annotations

import pytest

from loraweave.routers.searches.uniform import Uniform


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
