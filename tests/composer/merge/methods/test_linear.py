"""linear is the weighted sum of the dense updates."""

from __future__ import annotations

import torch
from tiny_models import dense
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.linear import linear


def test_it_equals_the_sum_of_the_dense_updates() -> None:
    experts, weights = [factors(0, 1), factors(1, 4), factors(2, 3)], [0.7, -0.4, 2.0]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    found = linear(experts, weights)
    assert found.rank == 8
    assert torch.allclose(dense(found), expected, rtol=1e-6, atol=1e-6)


def test_half_and_half_of_one_adapter_is_that_adapter() -> None:
    f = factors(0, 3)
    assert torch.allclose(dense(linear([f, f], [0.35, 0.35])), 0.7 * dense(f), rtol=1e-6, atol=1e-6)


def test_a_negative_weight_subtracts() -> None:
    f = factors(0, 3)
    assert torch.equal(dense(linear([f], [-1.0])), -dense(f))


def test_gains_and_biases_sum_with_their_weights() -> None:
    gain, bias = torch.arange(5.0), torch.ones(5)
    found = linear([factors(0, 2, gain_O=gain), factors(1, 2, gain_O=gain, bias_O=bias), factors(2, 1)], [0.5, -2.0, 3.0])
    assert torch.equal(found.gain_O, -1.5 * gain)
    assert torch.equal(found.bias_O, -2.0 * bias)
