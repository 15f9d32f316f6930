"""The sum of factors, against the products written out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors

from loraweave import registry
from loraweave.composer.merge.methods.factor_sum import factor_sum
from loraweave.errors import LayerMismatch
from loraweave.types import Factors


def test_it_has_every_cross_term() -> None:
    experts, weights = [factors(seed, 3) for seed in range(3)], [0.7, -0.4, 2.0]
    expected = sum(
        v * w * f.b_OR.double() @ g.a_RI.double()
        for v, f in zip(weights, experts, strict=True)
        for w, g in zip(weights, experts, strict=True)
    )
    found = factor_sum(experts, weights)
    assert found.rank == 3
    assert torch.allclose(dense(found), expected, rtol=1e-5, atol=1e-5)


def test_a_single_weight_counts_squared() -> None:
    f = factors(0, 3)
    assert torch.allclose(dense(factor_sum([f, None], [0.5, 1.0])), 0.25 * dense(f))
    assert torch.equal(dense(factor_sum([f], [1.0])), dense(f))


def test_the_common_sign_of_the_weights_cancels() -> None:
    experts = [factors(0, 3), factors(1, 3)]
    assert torch.equal(dense(factor_sum(experts, [0.7, -0.4])), dense(factor_sum(experts, [-0.7, 0.4])))


def test_with_one_scale_it_is_the_scale_times_the_product_of_the_raw_sums() -> None:
    # as the paper has it: the LoRA scale stays outside, here it is inside b
    scale, weights = 2.5, [0.7, -0.4]
    raw = [factors(0, 3), factors(1, 3)]
    folded = [Factors(f.a_RI, f.b_OR * scale) for f in raw]
    a_hat = sum(w * f.a_RI for w, f in zip(weights, raw, strict=True))
    b_hat = sum(w * f.b_OR for w, f in zip(weights, raw, strict=True))
    assert torch.allclose(dense(factor_sum(folded, weights)), (scale * b_hat @ a_hat).double(), rtol=1e-5, atol=1e-5)


def test_halves_of_different_experts_are_not_the_mean_of_updates() -> None:
    f, g = factors(0, 3), factors(1, 3)
    difference = dense(factor_sum([f, g], [0.5, 0.5])) - (dense(f) + dense(g)) / 2
    assert float(difference.norm()) > 0.1


def test_halves_of_one_expert_are_one_expert_of_the_whole_weight() -> None:
    # the sum of factors sees one expert of weight 0.7, and squares that
    f = factors(0, 3)
    assert torch.allclose(dense(factor_sum([f, f], [0.35, 0.35])), 0.49 * dense(f), rtol=1e-5, atol=1e-5)


def test_biases_sum_with_their_weights() -> None:
    found = factor_sum([factors(0, 2, bias_O=torch.ones(5)), factors(1, 2)], [0.5, 1.0])
    assert torch.equal(found.bias_O, torch.full((5,), 0.5))


def test_different_ranks_are_refused_with_the_twin_on_updates() -> None:
    assert "linear" in registry.names("methods")
    with pytest.raises(LayerMismatch, match="3 and 2: use linear,"):
        factor_sum([factors(0, 3), factors(1, 2)], [1.0, 1.0])
