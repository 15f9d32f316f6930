"""breadcrumbs drops the largest entries and the smallest, layer by layer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.breadcrumbs import breadcrumbs
from loraweave.types import Factors


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def reference(values: list[float], density: float, gamma: float) -> list[float]:
    """mergekit's counts (sparsify.py, magnitude outliers) on a sorted list, of equal magnitudes the earlier first."""
    size = len(values)
    target, num_outliers = int(density * size), int(gamma * size)
    num_small = size - target - num_outliers
    if num_small < 0:
        num_outliers, num_small = num_outliers + num_small, 0
    order = sorted(range(size), key=lambda i: (-abs(values[i]), i))
    keep = set(order[num_outliers : size - num_small])
    return [value if i in keep else 0.0 for i, value in enumerate(values)]


@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_it_is_the_weighted_sum_of_the_middle_entries(density: float, gamma: float) -> None:
    experts, weights = [factors(0), factors(1, 2), factors(2)], [0.7, -0.4, 1.3]
    middles = [torch.tensor(reference(dense(e).flatten().tolist(), density, gamma)) for e in experts]
    expected = 0.3 * sum(w * middle for w, middle in zip(weights, middles, strict=True))
    found = breadcrumbs(experts, weights, density=density, gamma=gamma, scale=0.3).delta_OI.flatten()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_kept_entries_are_bit_for_bit_what_they_were() -> None:
    update = factors(0)
    found = breadcrumbs([update], [1.0], density=0.5, gamma=0.2).delta_OI
    assert int(torch.count_nonzero(found)) == 17
    assert torch.equal(found[found != 0], dense(update)[found != 0])


def test_equal_magnitudes_are_counted_in_order() -> None:
    even = Factors(torch.ones(1, 10), torch.ones(1, 1))
    found = breadcrumbs([even], [1.0], density=0.5, gamma=0.2).delta_OI
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_a_bias_has_outliers_of_its_own() -> None:
    bias = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])
    found = breadcrumbs([factors(0, bias_O=bias), factors(1)], [0.5, 1.0], density=0.4, gamma=0.2)
    assert found.bias_O.tolist() == [0.0, -1.5, 1.0, 0.0, 0.0]
