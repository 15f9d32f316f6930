"""tsv sets the singular vectors of all experts beside each other and makes them orthonormal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.composer.merge.methods.tsv import tsv
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def polar(x: np.ndarray) -> np.ndarray:
    """The polar factor from one SVD, null directions left out."""
    p, d, qh = np.linalg.svd(x, full_matrices=False)
    keep = d > 1e-5 * d[0]
    return p[:, keep] @ qh[keep]


def reference(experts: Sequence[Factors], weights: Sequence[float], k: int) -> np.ndarray:
    """TSV-M, dense: the released code's steps with k no larger than an update's rank."""
    us, ss, vs = [], [], []
    for f, w in zip(experts, weights, strict=True):
        u, s, vh = np.linalg.svd(dense(f), full_matrices=False)
        kept = min(k, int((s > 1e-5 * s[0]).sum()))
        us.append(u[:, :kept])
        ss.append(w * s[:kept])
        vs.append(vh[:kept].T)
    return polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.hstack(vs)).T


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (5, 5, 5)])
@pytest.mark.parametrize("k", [1, 2, 99])
def test_it_equals_the_dense_definition(ranks: tuple[int, ...], k: int) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    found = tsv(experts, weights, k=k, scale=0.5)
    assert np.abs(dense(found) - 0.5 * reference(experts, weights, k)).max() < 1e-5
    assert found.rank <= min(sum(min(k, rank) for rank in ranks), 9)


@pytest.mark.parametrize(("num_experts", "rank"), [(2, 3), (3, 3), (4, 3), (9, 2), (6, 5)])
def test_by_default_each_expert_keeps_its_share_of_the_layer_s_dimensions(num_experts: int, rank: int) -> None:
    experts, weights = [factors(seed, rank) for seed in range(num_experts)], [1.0 - 0.3 * n for n in range(num_experts)]
    assert np.abs(dense(tsv(experts, weights)) - reference(experts, weights, 9 // num_experts)).max() < 1e-5


def test_more_experts_than_dimensions_keep_one_singular_vector_each() -> None:
    experts = [factors(seed, 2, num_out=3, num_in=4) for seed in range(5)]
    assert np.abs(dense(tsv(experts, [1.0] * 5)) - reference(experts, [1.0] * 5, 1)).max() < 1e-5


def test_an_expert_with_an_update_of_zeros_takes_no_share() -> None:
    zero, experts = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), [factors(0, 4), factors(1, 4)]
    assert torch.equal(tsv([*experts, zero, None], [1.0] * 4).b_OR, tsv(experts, [1.0, 1.0]).b_OR)


def test_a_single_expert_comes_back_and_k_cuts_it_to_its_best_approximation() -> None:
    f = factors(0, 3)
    assert np.abs(dense(tsv([f], [0.7])) - 0.7 * dense(f)).max() < 1e-5
    u, s, vh = np.linalg.svd(dense(f))
    assert np.abs(dense(tsv([f], [1.0], k=1)) - s[0] * np.outer(u[:, 0], vh[0])).max() < 1e-5


def test_experts_of_orthogonal_spaces_are_summed() -> None:
    first = Factors(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[2.0], [0], [0]]))
    second = Factors(torch.tensor([[0.0, 0, 3.0, 0]]), torch.tensor([[0.0], [0], [1.0]]))
    assert np.abs(dense(tsv([first, second], [1.0, 2.0])) - dense(first) - 2 * dense(second)).max() < 1e-6


def test_two_equal_halves_give_half_as_duplicates_are_shared_out() -> None:
    f = factors(0, 3)
    found = tsv([f, f], [0.5, 0.5])
    assert found.rank == 3
    assert np.abs(dense(found) - 0.5 * dense(f)).max() < 1e-5


def test_singular_vectors_of_the_result_are_orthonormal_so_its_singular_values_are_the_experts() -> None:
    experts = [factors(0, 2), factors(1, 3)]
    wanted = np.sort(np.concatenate([np.linalg.svd(dense(f))[1][: f.rank] for f in experts]))[::-1]
    assert np.allclose(np.linalg.svd(dense(tsv(experts, [1.0, 1.0])))[1][:5], wanted, rtol=1e-5)


def test_zeros_and_opposites() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(0, 2)
    assert np.abs(dense(tsv([zero, f], [1.0, 1.0])) - dense(f)).max() < 1e-5
    cancelled = tsv([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0])
    assert cancelled.rank == 0
    assert not dense(tsv([f], [1.0], scale=0.0)).any()
