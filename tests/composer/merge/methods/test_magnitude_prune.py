"""magnitude_prune is the weighted sum of each update's largest entries, as in PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft.utils import merge_utils
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.magnitude_prune import magnitude_prune
from loraweave.types import Factors

WEIGHTS = [0.7, -0.4, 1.3]


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (40, 3)])
def test_it_is_peft_s_on_the_dense_updates(density: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = merge_utils.magnitude_prune([dense(e) for e in experts], torch.tensor(WEIGHTS), density)
    found = magnitude_prune(experts, WEIGHTS, density=density).delta_OI
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_keeps_the_largest_by_a_sorted_list() -> None:
    update = factors(0)
    order = sorted(range(35), key=lambda i: -abs(float(dense(update).flatten()[i])))
    expected = torch.zeros(35)
    expected[order[:12]] = dense(update).flatten()[order[:12]]
    assert torch.allclose(magnitude_prune([update], [2.0], density=0.35, scale=0.25).delta_OI.flatten(), expected / 2)


def test_exactly_as_many_are_kept_when_magnitudes_are_equal() -> None:
    even = Factors(torch.ones(1, 7), torch.ones(5, 1))
    for count in range(36):
        found = magnitude_prune([even], [1.0], density=(count + 0.2) / 35 if count < 35 else 1.0).delta_OI.flatten()
        assert found.tolist() == [1.0] * count + [0.0] * (35 - count)


def test_opposite_experts_leave_exactly_nothing() -> None:
    update = factors(0)
    found = magnitude_prune([update, Factors(update.a_RI, -update.b_OR)], [0.3, 0.3]).delta_OI
    assert not found.any()


def test_a_bias_is_pruned_as_a_vector_of_its_own() -> None:
    bias = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])
    found = magnitude_prune([factors(0, bias_O=bias), factors(1)], [0.5, 1.0], density=0.4)
    assert found.bias_O.tolist() == [2.0, -1.5, 0.0, 0.0, 0.0]
