"""pico turns down the output directions that the experts share, and gives the result the experts' mean norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.composer.merge.method_call import DenseUpdate
from loraweave.composer.merge.methods.ties_per_layer import ties_per_layer
from loraweave.extensions.methods.methods.pico import pico
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def calibrated(deltas: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The steps of the authors' `calibrate_layer`, with B the updates side by side (their B for orthonormal A)."""
    u, sigma, _ = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    collision = sigma**2 / (sigma**2).sum()
    alpha = 1 / (1 + (len(deltas) - 1) * collision)
    return [d + u @ np.diag(alpha - 1) @ u.T @ d for d in deltas]


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (5, 5, 5)])
def test_it_equals_the_dense_definition(ranks: tuple[int, ...]) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    deltas = [dense(f) for f in experts]
    merged = sum(w * d for w, d in zip(weights, calibrated(deltas), strict=True))
    assert np.abs(dense(pico(experts, weights, rescale=False)) - merged).max() < 1e-5
    aim = sum(abs(w) * np.linalg.norm(d) for w, d in zip(weights, deltas, strict=True)) / len(deltas)
    found = pico(experts, weights)
    assert np.abs(dense(found) - merged * aim / np.linalg.norm(merged)).max() < 1e-5
    assert found.rank <= sum(ranks)


def test_any_rule_merges_the_calibrated_updates() -> None:
    experts = [factors(0, 2), factors(1, 3)]
    deltas = [dense(f) for f in experts]
    eye = torch.eye(11)
    turned = [Factors(eye, torch.from_numpy(d).float()) for d in calibrated(deltas)]
    merged = dense(ties_per_layer(turned, [1.0, 1.0], density=0.3))
    found = pico(experts, [1.0, 1.0], inner="ties_per_layer", inner_options={"density": 0.3})
    assert isinstance(found, DenseUpdate)
    aim = sum(np.linalg.norm(d) for d in deltas) / 2
    assert np.abs(dense(found) - merged * aim / np.linalg.norm(merged)).max() < 1e-5


def test_where_the_authors_a_is_orthonormal_their_b_and_ours_agree() -> None:
    # B_all is then as trained: its singular vectors and values are those of the updates side by side
    experts = []
    for seed in range(3):
        a = torch.linalg.qr(torch.randn(11, 2, generator=torch.Generator().manual_seed(seed)))[0].T
        experts.append(Factors(a, factors(seed, 2).b_OR))
    stacked = np.hstack([f.b_OR.double().numpy() for f in experts])
    u, sigma, _ = np.linalg.svd(stacked, full_matrices=False)
    alpha = 1 / (1 + 2 * sigma**2 / (sigma**2).sum())
    change = np.eye(9) + u @ np.diag(alpha - 1) @ u.T
    expected = change @ sum(dense(f) for f in experts)
    assert np.abs(dense(pico(experts, [1.0] * 3, rescale=False)) - expected).max() < 1e-5


def test_shared_output_directions_count_less_and_own_ones_stay() -> None:
    # one output direction in common, of much energy, and one of each expert's own
    shared = Factors(torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 0]]), torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    other = Factors(torch.tensor([[0, 0, 3.0, 0], [0, 0, 0, 1]]), torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
    found = dense(pico([shared, other], [1.0, 1.0], rescale=False))
    # sigma^2 = 18, 1, 1: shares 0.9, 0.05, 0.05
    assert np.allclose(found, np.array([[3 / 1.9, 0, 3 / 1.9, 0], [0, 1 / 1.05, 0, 0], [0, 0, 0, 1 / 1.05]]), atol=1e-5)


def test_a_single_expert_comes_back_with_its_weight() -> None:
    f = factors(0, 3)
    assert np.abs(dense(pico([f], [-0.7])) + 0.7 * dense(f)).max() < 1e-5
    zero = Factors(torch.zeros(2, 11), torch.zeros(9, 2))
    assert np.abs(dense(pico([zero, f], [1.0, 2.0])) - 2.0 * dense(f)).max() < 1e-5


def test_the_result_has_the_mean_norm_of_the_experts() -> None:
    experts = [factors(0, 2), factors(1, 3), factors(2, 1)]
    wanted = sum(np.linalg.norm(dense(f)) for f in experts) / 3
    assert np.isclose(np.linalg.norm(dense(pico(experts, [1.0, 1.0, 1.0]))), wanted, rtol=1e-5)


def test_experts_that_cancel_are_not_blown_up_from_their_rounding() -> None:
    f = factors(0, 2)
    assert np.abs(dense(pico([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0]))).max() < 1e-5


def test_biases_are_merged_by_the_inner_rule_and_not_rescaled() -> None:
    experts = [factors(0, 2, bias_O=torch.full((9,), 2.0)), factors(1, 1, bias_O=torch.full((9,), -1.0))]
    assert torch.equal(pico(experts, [1.0, 3.0]).bias_O, torch.full((9,), -1.0))
    elected = pico(experts, [1.0, 3.0], inner="ties_per_layer", inner_options={"density": 1.0})
    assert torch.equal(elected.bias_O, torch.full((9,), 2.0))
