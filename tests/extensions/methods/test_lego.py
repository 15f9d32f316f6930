"""lego clusters rank-one units and keeps one unit for each cluster."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.extensions.methods.methods.lego import _signs, lego
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def near(f: Factors, seed: int, size: float = 0.02) -> Factors:
    noise = factors(seed, f.rank)
    return Factors(f.a_RI + size * noise.a_RI, f.b_OR + size * noise.b_OR)


def test_with_as_many_clusters_as_units_it_is_the_weighted_sum() -> None:
    experts, weights = [factors(0, 1), factors(1, 4), factors(2, 3)], [0.7, -0.4, 2.0]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    for num_clusters in (8, 100):
        found = lego(experts, weights, num_clusters=num_clusters, reweight=False)
        assert found.rank == 8
        assert np.abs(dense(found) - expected).max() < 1e-5


def test_reweighting_multiplies_that_sum_by_the_root_of_rank_over_clusters() -> None:
    experts = [factors(0, 2), factors(1, 4)]
    plain = lego(experts, [1.0, 1.0], num_clusters=6, reweight=False)
    assert np.abs(dense(lego(experts, [1.0, 1.0], num_clusters=6)) - (4 / 6) ** 0.5 * dense(plain)).max() < 1e-5


@pytest.mark.parametrize("reweight", [False, True])
def test_each_cluster_becomes_its_mean_unit(reweight: bool) -> None:
    # units of the two experts pair up; the definition is written out for the pairs
    first = factors(0, 3)
    second = near(first, 1)
    shuffled = Factors(second.a_RI[[2, 0, 1]], second.b_OR[:, [2, 0, 1]])
    weight = 1.5
    expected = np.zeros((9, 11))
    for i in range(3):
        units = [
            np.concatenate([first.a_RI[i].double().numpy(), first.b_OR[:, i].double().numpy()]),
            np.concatenate([second.a_RI[i].double().numpy(), weight * second.b_OR[:, i].double().numpy()]),
        ]
        mean = sum(units) / 2
        if reweight:
            mean = mean * sum(np.abs(u).max() for u in units) / 2 / np.abs(mean).max()
        expected += np.outer(mean[11:], mean[:11])
    found = lego([first, shuffled], [1.0, weight], reweight=reweight)
    assert found.rank == 3
    assert np.abs(dense(found) - expected).max() < 1e-5


def test_a_unit_and_its_negative_are_the_same_unit() -> None:
    first = factors(0, 3)
    second = near(first, 1)
    sign = torch.tensor([1.0, -1.0, -1.0])
    flipped = Factors(second.a_RI * sign[:, None], second.b_OR * sign)
    assert np.abs(dense(lego([first, second], [1.0, 1.0])) - dense(lego([first, flipped], [1.0, 1.0]))).max() < 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_units_that_a_chain_of_like_ones_links_point_the_same_way(order: tuple[int, ...]) -> None:
    # neighbours are 35 degrees apart, so that the ends of the chain point away from each other
    angles = np.radians(35.0) * np.array(order)
    flips = np.array([1.0, -1.0, -1.0, 1.0])
    signs = _signs(flips[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)).numpy()
    assert len(set(signs * flips)) == 1


def test_the_order_of_ranks_and_of_experts_plays_no_part() -> None:
    experts = [factors(0, 3), factors(1, 4), factors(2, 2)]
    moved = [Factors(f.a_RI.flip(0), f.b_OR.flip(1)) for f in experts]
    found = dense(lego(experts, [1.0, 0.5, -1.0], num_clusters=4))
    assert np.abs(found - dense(lego(moved, [1.0, 0.5, -1.0], num_clusters=4))).max() < 1e-6
    assert np.abs(found - dense(lego(experts[::-1], [-1.0, 0.5, 1.0], num_clusters=4))).max() < 1e-6


def test_a_single_expert_and_equal_experts_come_back() -> None:
    f = factors(0, 3)
    assert np.abs(dense(lego([f], [-0.7])) + 0.7 * dense(f)).max() < 1e-5
    found = lego([f, f], [1.0, 1.0])
    assert found.rank == 3
    assert np.abs(dense(found) - dense(f)).max() < 1e-5
    # five clusters of three different units are three
    assert lego([f, f], [1.0, 1.0], num_clusters=5).rank == 3


def test_the_rank_is_the_number_of_clusters_and_the_largest_rank_by_default() -> None:
    experts = [factors(0, 3), factors(1, 5)]
    assert lego(experts, [1.0, 1.0]).rank == 5
    assert lego(experts, [1.0, 1.0], num_clusters=2).rank == 2


def test_zeros_and_opposites() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(0, 2)
    assert np.abs(dense(lego([zero, f], [1.0, 1.0])) - dense(f)).max() < 1e-5
    assert np.isfinite(dense(lego([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0], num_clusters=1))).all()
