"""Inner products of updates from their factors, and sums with any coefficients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods._span import combination, gram, mean_weights, shares
from loraweave.errors import WeightingError


def test_the_gram_matrix_has_the_inner_products_of_the_dense_updates() -> None:
    updates = [factors(0, 1), factors(1, 0), factors(2, 4), factors(3, 3)]
    dense = [f.b_OR.double() @ f.a_RI.double() for f in updates]
    expected = torch.stack([torch.stack([(x * y).sum() for y in dense]) for x in dense])
    assert torch.allclose(gram(updates), expected, rtol=1e-13, atol=1e-13)


def test_a_combination_without_coefficients_has_rank_zero_and_the_layers_shape() -> None:
    found = combination([factors(0, 2)], [0.0])
    assert (found.a_RI.shape, found.b_OR.shape) == ((0, 7), (5, 0))


def test_weights_become_shares_of_their_sum() -> None:
    assert shares([1.0, 0.0, 3.0]) == [0.25, 0.0, 0.75]
    assert mean_weights([3.0, -1.0]) == [1.5, -0.5]
    assert shares([0.0, 0.0]) == [0.0, 0.0]


def test_negative_shares_are_refused_with_the_weights() -> None:
    with pytest.raises(WeightingError, match=r"takes the weights as shares.*1, -0.5"):
        shares([1.0, -0.5])
