"""robust_merge prunes the factors of each update's SVD and shares out the coefficients that make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.extensions.methods.methods.robust_merge import robust_merge
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def kept(x: np.ndarray, density: float) -> np.ndarray:
    count = max(int(density * x.size), 1)
    bound = np.sort(np.abs(x).ravel())[-count]
    return np.where(np.abs(x) >= bound, x, 0.0)


def reference(experts: Sequence[Factors], weights: Sequence[float], density: float) -> np.ndarray:
    """Algorithm 1 as TARA-Merge's code has it (prune, coefficients, normalise, sum updates), on balanced SVD factors."""
    pruned, coefficients = [], []
    for f in experts:
        u, s, vh = np.linalg.svd(dense(f), full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        b, a = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vh[:rank]
        b_kept, a_kept = kept(b, density), kept(a, density)
        pruned.append((b_kept, a_kept))
        coefficients.append([np.abs(a[i]).sum() / np.abs(a_kept[i]).sum() if a_kept[i].any() else 0.0 for i in range(rank)])
    out = np.zeros_like(dense(experts[0]))
    for w, (b, a), s in zip(weights, pruned, coefficients, strict=True):
        for i, coefficient in enumerate(s):
            total = sum(other[i] for other in coefficients if i < len(other))
            if total:
                out += w * coefficient / total * np.outer(b[:, i], a[i])
    return out


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (5, 5, 5)])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_it_equals_the_written_out_definition(ranks: tuple[int, ...], density: float) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    found = robust_merge(experts, weights, density=density, scale=2.0)
    assert np.abs(dense(found) - 2.0 * reference(experts, weights, density)).max() < 1e-5
    assert found.rank <= sum(ranks)


def test_without_pruning_experts_of_one_rank_are_averaged() -> None:
    experts = [factors(0, 2), factors(1, 2)]
    found = robust_merge(experts, [1.0, 1.0], density=1.0)
    assert np.abs(dense(found) - (dense(experts[0]) + dense(experts[1])) / 2).max() < 1e-5
    assert np.abs(dense(robust_merge(experts[:1], [3.0], density=1.0)) - 3 * dense(experts[0])).max() < 1e-5


def test_weak_directions_gain_what_pruning_takes_from_them() -> None:
    # of two experts, the one whose second direction is weak loses more of that row, and gets more than half of the share
    strong, weak = factors(0, 2), factors(1, 2)
    for f, second in ((strong, 1.0), (weak, 0.1)):
        u, _, vh = torch.linalg.svd(f.b_OR @ f.a_RI)
        f.b_OR[:] = u[:, :2] * torch.tensor([1.0, second])
        f.a_RI[:] = vh[:2]
    found = dense(robust_merge([strong, weak], [1.0, 1.0], density=0.5))
    plain = reference([strong, weak], [1.0, 1.0], 0.5)
    assert np.abs(found - plain).max() < 1e-5
    _, s, vh = np.linalg.svd(dense(weak))
    row = np.sqrt(s[1]) * vh[1]
    bound = np.sort(np.abs(np.sqrt(s[:2])[:, None] * vh[:2]).ravel())[-11]
    assert np.abs(row[np.abs(row) >= bound]).sum() < 0.5 * np.abs(row).sum()


def test_a_direction_that_is_pruned_from_every_expert_takes_no_part() -> None:
    experts = [factors(0, 2), factors(1, 2)]
    for f in experts:
        u, _, vh = torch.linalg.svd(f.b_OR @ f.a_RI)
        f.b_OR[:] = u[:, :2] * torch.tensor([1.0, 1e-3])
        f.a_RI[:] = vh[:2]
    found = robust_merge(experts, [1.0, 1.0], density=0.3)
    assert found.rank == 2
    assert np.abs(dense(found) - reference(experts, [1.0, 1.0], 0.3)).max() < 1e-5


def test_an_update_of_zeros_does_not_count() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(0, 2)
    assert np.abs(dense(robust_merge([zero, f], [1.0, 1.0])) - dense(robust_merge([f], [1.0]))).max() < 1e-6
