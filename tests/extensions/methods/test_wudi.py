"""wudi follows the gradient of the sum of |(T - D_e) D_e^T|^2 / |D_e|^2 for a while, or minimises it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.composer.merge.method_call import DenseUpdate
from loraweave.extensions.methods.methods.wudi import wudi
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def loss(t: np.ndarray, deltas: Sequence[np.ndarray]) -> float:
    return sum(float(np.sum(((t - d) @ d.T) ** 2) / np.sum(d**2)) for d in deltas)


def weighted(experts: Sequence[Factors], weights: Sequence[float]) -> list[np.ndarray]:
    return [w * dense(f) for f, w in zip(experts, weights, strict=True)]


def exact(experts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    found = wudi(experts, weights, minimiser="exact")
    assert found is not None
    return found


def of_nearly_equal_a(apart: float, size: float) -> list[Factors]:
    """Four experts of rank 3, whose b are as different as can be and whose a differ by `apart` beside a common one."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(3, 24, generator=generator) / 5
    return [
        Factors(common + apart * torch.randn(3, 24, generator=generator) / 5, size * torch.randn(20, 3, generator=generator))
        for _ in range(4)
    ]


def descended(deltas: Sequence[np.ndarray], time: float, steps: int) -> np.ndarray:
    """The loss followed downhill from the sum in many small plain steps, `time` in all; half its gradient is the pull."""
    t = sum(deltas)
    for _ in range(steps):
        t = t - time / steps * sum((t - d) @ d.T @ d / np.sum(d**2) for d in deltas)
    return t


def released(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """300 steps of Adam at a rate of 1e-5 from the sum, as the released code takes them."""
    stack = torch.tensor(np.stack(deltas))
    merged = torch.nn.Parameter(stack.sum(dim=0))
    optimiser = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        optimiser.zero_grad()
        disturbed = (merged - stack) @ stack.mT
        (disturbed.square() / stack.square().sum(dim=(1, 2), keepdim=True)).sum().backward()
        optimiser.step()
    return merged.detach().numpy()


SIZES = [1.0, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-3])
def test_it_equals_small_steps_downhill_whose_first_root_mean_square_is_that_of_the_released_ones(
    size: float, apart: float
) -> None:
    experts, weights = of_nearly_equal_a(apart, size), [1.0, 0.7, -0.4, 2.0]
    deltas = weighted(experts, weights)
    pull = sum((sum(deltas) - d) @ d.T @ d / np.sum(d**2) for d in deltas)
    time = 300 * 1e-5 / np.sqrt(np.mean(pull**2))
    steps = int(200 + 400 * time)
    # halving the step halves what is left of the error of plain steps
    coarse, fine = descended(deltas, time, steps), descended(deltas, time, 2 * steps)
    expected = 2 * fine - coarse
    assert np.linalg.norm(dense(wudi(experts, weights)) - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("size", SIZES)
def test_experts_of_equal_or_nearly_equal_a_keep_about_the_norm_of_their_sum(apart: float, size: float) -> None:
    experts = of_nearly_equal_a(apart, size)
    total = sum(weighted(experts, [1.0] * 4))
    assert 0.2 < np.linalg.norm(dense(wudi(experts, [1.0] * 4))) / np.linalg.norm(total) < 1.5


@pytest.mark.parametrize(("apart", "least"), [(1e-3, 100.0), (1e-2, 10.0)])
def test_the_exact_minimiser_of_nearly_equal_a_is_far_away(apart: float, least: float) -> None:
    experts = of_nearly_equal_a(apart, 0.1)
    total = sum(weighted(experts, [1.0] * 4))
    assert np.linalg.norm(dense(exact(experts, [1.0] * 4))) / np.linalg.norm(total) > least


@pytest.mark.parametrize("apart", [1e-3, 0.1])
@pytest.mark.parametrize("size", SIZES[1:])
def test_it_is_nearer_to_what_the_released_code_gives_than_the_sum_and_the_minimum_are(apart: float, size: float) -> None:
    experts = of_nearly_equal_a(apart, size)
    deltas = weighted(experts, [1.0] * 4)
    theirs = released(deltas)
    miss = np.linalg.norm(dense(wudi(experts, [1.0] * 4)) - theirs)
    assert miss < 0.95 * np.linalg.norm(sum(deltas) - theirs)
    assert miss < 0.95 * np.linalg.norm(dense(exact(experts, [1.0] * 4)) - theirs)


@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("size", SIZES)
def test_released_is_the_released_steps(apart: float, size: float) -> None:
    experts, weights = of_nearly_equal_a(apart, size), [1.0, 0.7, -0.4, 2.0]
    theirs = released(weighted(experts, weights))
    found = wudi(experts, weights, minimiser="released")
    assert isinstance(found, DenseUpdate)
    # both take the steps in float64, and ours is rounded to fp32 at the end
    assert np.abs(found.delta_OI.double().numpy() - theirs).max() <= 2.0**-23 * np.abs(theirs).max()


def test_released_weighs_biases_and_stays_at_the_minimum() -> None:
    f = replace(factors(0, 3), bias_O=torch.arange(9.0))
    found = wudi([f], [-0.7], minimiser="released")
    assert np.abs(found.delta_OI.numpy() + 0.7 * dense(f)).max() <= 2.0**-22 * np.abs(dense(f)).max()
    assert torch.equal(found.bias_O, (-0.7 * torch.arange(9.0).double()).float())


def test_no_entry_moves_further_on_average_than_300_steps_of_1e_5() -> None:
    for size in (0.1, 1e-3, 1e-5):
        experts = of_nearly_equal_a(0.01, size)
        moved = dense(wudi(experts, [1.0] * 4)) - sum(weighted(experts, [1.0] * 4))
        assert np.sqrt(np.mean(moved**2)) < 0.003


CASES = [((2, 2), (1.0, 1.0)), ((1, 4, 3), (0.7, -0.4, 2.0)), ((6, 6, 6), (1.0, 2.0, 3.0))]


@pytest.mark.parametrize(("ranks", "weights"), CASES)
def test_exact_equals_the_dense_least_squares_solution(ranks: tuple[int, ...], weights: tuple[float, ...]) -> None:
    experts = [factors(seed, rank) for seed, rank in enumerate(ranks)]
    deltas = weighted(experts, weights)
    gram = sum(d.T @ d / np.sum(d**2) for d in deltas)
    target = sum(d @ d.T @ d / np.sum(d**2) for d in deltas)
    total = sum(deltas)
    inverse = np.linalg.pinv(gram, rcond=1e-10)
    # the minimiser nearest to the weighted sum
    expected = total + (target - total @ gram) @ inverse
    found = exact(experts, weights)
    assert np.abs(dense(found) - expected).max() < 1e-4
    assert found.rank <= min(sum(ranks), 11)


@pytest.mark.parametrize(("ranks", "weights"), CASES)
def test_of_the_exact_one_the_gradient_vanishes_and_no_other_update_is_better(
    ranks: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    experts = [factors(seed, rank) for seed, rank in enumerate(ranks)]
    deltas, found = weighted(experts, weights), dense(exact(experts, weights))
    pull = [(found - d) @ d.T @ d / np.sum(d**2) for d in deltas]
    assert np.abs(sum(pull)).max() < 1e-5 * max(np.abs(p).max() for p in pull) + 1e-6
    best = loss(found, deltas)
    rows = np.linalg.svd(np.vstack(deltas))[2][: min(sum(ranks), 11)]
    generator = np.random.default_rng(0)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(20):
            step = generator.normal(size=(9, len(rows))) @ rows
            assert loss(found + size * step, deltas) > best - 1e-9


def test_of_all_minimisers_the_exact_one_is_the_one_that_leaves_unseen_inputs_alone() -> None:
    experts = [factors(0, 2), factors(1, 2)]
    unseen = np.linalg.svd(np.vstack([dense(f) for f in experts]))[2][4:].T
    assert np.abs(dense(exact(experts, [1.0, 1.0])) @ unseen).max() < 1e-5


def test_with_two_experts_of_joint_full_row_rank_the_exact_loss_is_zero() -> None:
    # four directions, four demands: T = D_1 on the rows of one and D_2 on those of the other
    experts = [factors(0, 2), factors(1, 2)]
    deltas = weighted(experts, [1.0, 1.0])
    assert loss(dense(exact(experts, [1.0, 1.0])), deltas) < 1e-8
    assert loss(sum(deltas), deltas) > 1.0


@pytest.mark.parametrize("minimiser", ["early", "exact"])
def test_a_single_expert_comes_back(minimiser: str) -> None:
    f = factors(0, 3)
    assert np.abs(dense(wudi([f], [-0.7], minimiser=minimiser)) + 0.7 * dense(f)).max() < 1e-5


def test_exact_averages_equal_experts_and_both_sum_orthogonal_ones() -> None:
    f, other = factors(0, 2), factors(1, 2)
    assert np.abs(dense(exact([f, f], [0.5, 2.0])) - 1.25 * dense(f)).max() < 1e-5
    left = Factors(torch.cat([f.a_RI[:, :5], torch.zeros(2, 6)], 1), f.b_OR)
    right = Factors(torch.cat([torch.zeros(2, 5), other.a_RI[:, 5:]], 1), other.b_OR)
    for minimiser in ("early", "exact"):
        found = wudi([left, right], [1.0, 1.0], minimiser=minimiser)
        assert np.abs(dense(found) - dense(left) - dense(right)).max() < 1e-5


def test_exact_is_linear_in_the_weights() -> None:
    experts = [factors(0, 2), factors(1, 5), factors(2, 6)]
    one, other = dense(exact(experts, [1.0, 0.5, -1.0])), dense(exact(experts, [2.0, 1.0, 3.0]))
    assert np.abs(dense(exact(experts, [3.0, 1.5, 2.0])) - one - other).max() < 1e-4


def test_zeros_and_opposites() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(0, 2)
    assert np.abs(dense(wudi([zero, f], [1.0, 1.0])) - dense(f)).max() < 1e-5
    assert np.abs(dense(wudi([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0]))).max() < 1e-6
