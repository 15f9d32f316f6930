"""Method genknowsub against the sum and the mean written out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.linear import linear
from loraweave.extensions.methods.methods.genknowsub import genknowsub
from loraweave.types import Factors


def close(found: Factors, expected: torch.Tensor) -> bool:
    return torch.allclose(dense(found), expected, rtol=1e-5, atol=1e-6)


EXPERTS = [factors(0, 1), factors(1, 4), factors(2, 3)]


def test_general_knowledge_is_a_mean_that_is_subtracted_once() -> None:
    task, general, other = EXPERTS
    expected = 0.5 * dense(task) - (1.0 * dense(general) + 3.0 * dense(other)) / 4.0
    assert close(genknowsub(EXPERTS, [0.5, -1.0, -3.0]), expected)
    assert torch.equal(dense(genknowsub(EXPERTS, [0.5, -2.0, -6.0])), dense(genknowsub(EXPERTS, [0.5, -1.0, -3.0])))


def test_without_general_knowledge_it_is_the_sum() -> None:
    assert torch.equal(dense(genknowsub(EXPERTS, [1.0, 0.5, 2.0])), dense(linear(EXPERTS, [1.0, 0.5, 2.0])))


def test_a_general_expert_without_the_layer_stays_in_the_mean() -> None:
    found = genknowsub([EXPERTS[0], EXPERTS[1], None], [1.0, -1.0, -1.0])
    assert close(found, dense(EXPERTS[0]) - dense(EXPERTS[1]) / 2)


def test_a_task_that_is_all_general_knowledge_is_gone() -> None:
    assert close(genknowsub([EXPERTS[0], EXPERTS[0]], [1.0, -1.0]), torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("part", ["gain_O", "bias_O", "magnitude_O", "base_bias_O"])
def test_one_expert_of_weight_one_comes_back_whatever_its_kind(part: str) -> None:
    expert = factors(0, 2, **{part: torch.arange(5.0)})
    found = genknowsub([None, expert, factors(1, 1)], [0.0, 1.0, 0.0])
    given = expert.tensors()
    assert found.tensors().keys() == given.keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, given[name])
        assert tensor.data_ptr() != given[name].data_ptr()
