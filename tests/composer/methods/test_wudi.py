"""wudi minimises the sum of |(T - D_e) D_e^T|^2 / |D_e|^2 exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loraweave.composer.methods.wudi import wudi
from loraweave.types import Factors


def factors(rank: int, seed: int, num_out: int = 9, num_in: int = 11, **parts: torch.Tensor) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator), **parts)


def dense(update: Factors) -> np.ndarray:
    return (update.b_OR.double() @ update.a_RI.double()).numpy()


def loss(t: np.ndarray, deltas: Sequence[np.ndarray]) -> float:
    return sum(float(np.sum(((t - d) @ d.T) ** 2) / np.sum(d**2)) for d in deltas)


def weighted(experts: Sequence[Factors], weights: Sequence[float]) -> list[np.ndarray]:
    return [w * dense(f) for f, w in zip(experts, weights, strict=True)]


CASES = [((2, 2), (1.0, 1.0)), ((1, 4, 3), (0.7, -0.4, 2.0)), ((6, 6, 6), (1.0, 2.0, 3.0))]


@pytest.mark.parametrize(("ranks", "weights"), CASES)
def test_it_equals_the_dense_least_squares_solution(ranks: tuple[int, ...], weights: tuple[float, ...]) -> None:
    experts = [factors(rank, seed) for seed, rank in enumerate(ranks)]
    deltas = weighted(experts, weights)
    gram = sum(d.T @ d / np.sum(d**2) for d in deltas)
    target = sum(d @ d.T @ d / np.sum(d**2) for d in deltas)
    total = sum(deltas)
    inverse = np.linalg.pinv(gram, rcond=1e-10)
    # the minimiser nearest to the weighted sum
    expected = total + (target - total @ gram) @ inverse
    found = wudi(experts, weights)
    assert np.abs(dense(found) - expected).max() < 1e-4
    assert found.rank <= min(sum(ranks), 11)


@pytest.mark.parametrize(("ranks", "weights"), CASES)
def test_the_gradient_vanishes_and_no_other_update_is_better(ranks: tuple[int, ...], weights: tuple[float, ...]) -> None:
    experts = [factors(rank, seed) for seed, rank in enumerate(ranks)]
    deltas, found = weighted(experts, weights), dense(wudi(experts, weights))
    pull = [(found - d) @ d.T @ d / np.sum(d**2) for d in deltas]
    assert np.abs(sum(pull)).max() < 1e-5 * max(np.abs(p).max() for p in pull) + 1e-6
    best = loss(found, deltas)
    rows = np.linalg.svd(np.vstack(deltas))[2][: min(sum(ranks), 11)]
    generator = np.random.default_rng(0)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(20):
            step = generator.normal(size=(9, len(rows))) @ rows
            assert loss(found + size * step, deltas) > best - 1e-9


def test_of_all_minimisers_it_is_the_one_that_leaves_unseen_inputs_alone() -> None:
    experts = [factors(2, 0), factors(2, 1)]
    unseen = np.linalg.svd(np.vstack([dense(f) for f in experts]))[2][4:].T
    assert np.abs(dense(wudi(experts, [1.0, 1.0])) @ unseen).max() < 1e-5


def test_with_two_experts_of_joint_full_row_rank_the_loss_is_zero() -> None:
    # four directions, four demands: T = D_1 on the rows of one and D_2 on those of the other
    experts = [factors(2, 0), factors(2, 1)]
    deltas = weighted(experts, [1.0, 1.0])
    assert loss(dense(wudi(experts, [1.0, 1.0])), deltas) < 1e-8
    assert loss(sum(deltas), deltas) > 1.0


def test_a_single_expert_comes_back() -> None:
    f = factors(3, 0)
    assert np.abs(dense(wudi([f], [-0.7])) + 0.7 * dense(f)).max() < 1e-5


def test_equal_experts_are_averaged_and_orthogonal_ones_summed() -> None:
    f, other = factors(2, 0), factors(2, 1)
    assert np.abs(dense(wudi([f, f], [0.5, 2.0])) - 1.25 * dense(f)).max() < 1e-5
    left = Factors(torch.cat([f.a_RI[:, :5], torch.zeros(2, 6)], 1), f.b_OR)
    right = Factors(torch.cat([torch.zeros(2, 5), other.a_RI[:, 5:]], 1), other.b_OR)
    assert np.abs(dense(wudi([left, right], [1.0, 1.0])) - dense(left) - dense(right)).max() < 1e-5


def test_it_is_linear_in_the_weights() -> None:
    experts = [factors(2, 0), factors(5, 1), factors(6, 2)]
    one, other = dense(wudi(experts, [1.0, 0.5, -1.0])), dense(wudi(experts, [2.0, 1.0, 3.0]))
    assert np.abs(dense(wudi(experts, [3.0, 1.5, 2.0])) - one - other).max() < 1e-4


def test_only_the_updates_count_and_not_their_order() -> None:
    experts, weights = [factors(2, 0), factors(5, 1), factors(6, 2)], [1.0, 0.5, -2.0]
    found = wudi(experts, weights)
    turn = torch.tensor([[2.0, 1.0], [-1.0, 3.0]]).double()
    split = Factors((turn @ experts[0].a_RI.double()).float(), (experts[0].b_OR.double() @ torch.linalg.inv(turn)).float())
    assert np.abs(dense(found) - dense(wudi([split, *experts[1:]], weights))).max() < 1e-4
    assert np.abs(dense(found) - dense(wudi(experts[::-1], weights[::-1]))).max() < 1e-5


def test_an_equal_update_in_other_factors_is_the_same_update() -> None:
    f = factors(3, 0)
    turn = (torch.randn(3, 3, generator=torch.Generator().manual_seed(7)) + 3 * torch.eye(3)).double()
    split = Factors((turn @ f.a_RI.double()).float(), (f.b_OR.double() @ torch.linalg.inv(turn)).float())
    assert np.abs(dense(wudi([f, split], [1.0, 1.0])) - dense(f)).max() < 1e-4


def test_zeros_and_opposites() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(2, 0)
    assert wudi([zero, zero], [1.0, 1.0]).rank == 0
    assert np.abs(dense(wudi([zero, f], [1.0, 1.0])) - dense(f)).max() < 1e-5
    assert np.abs(dense(wudi([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0]))).max() < 1e-6
    assert wudi([None], [1.0]) is None


def test_biases_are_summed_with_weights() -> None:
    experts = [factors(2, 0, bias_O=torch.ones(9)), factors(1, 1), factors(1, 2, bias_O=torch.ones(9))]
    assert torch.equal(wudi(experts, [0.5, 1.0, 2.0]).bias_O, torch.full((9,), 2.5))
