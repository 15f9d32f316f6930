"""iso_c and iso_cts make singular values equal, within what the experts span."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.composer.merge.methods.iso_c import iso_c
from loraweave.composer.merge.methods.iso_cts import iso_cts
from loraweave.types import Factors

factors = partial(random_factors, num_out=12, num_in=14)


def svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The compact SVD: null directions left out."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    keep = s > 1e-5 * max(s[0], 1e-30)
    return u[:, keep], s[keep], vh[keep]


def common(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Iso-C, dense, with the mean over the support."""
    u, s, vh = svd(sum(deltas))
    return s.mean() * u @ vh


def with_specific(deltas: Sequence[np.ndarray], fraction: float) -> np.ndarray:
    """Iso-CTS, dense: the steps of the released code with the joint rank in the place of min(O, I)."""
    dimension = min(np.linalg.matrix_rank(np.hstack(deltas), tol=1e-4), np.linalg.matrix_rank(np.vstack(deltas), tol=1e-4))
    own = round((dimension - int(dimension * fraction)) / len(deltas))
    u, s, vh = svd(sum(deltas))
    shared = max(dimension - own * len(deltas), 0)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [vh[:shared].T]
    for d in deltas:
        u_d, s_d, vh_d = np.linalg.svd(d - us[0] @ us[0].T @ d, full_matrices=False)
        keep = min(own, int((s_d > 1e-5 * np.linalg.norm(d, 2)).sum()))
        us.append(u_d[:, :keep])
        ss.append(s_d[:keep])
        vs.append(vh_d[:keep].T)
    (left, _, left_h), (right, _, right_h) = svd(np.hstack(us)), svd(np.hstack(vs))
    return np.concatenate(ss).mean() * (left @ left_h) @ (right @ right_h).T


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (8, 8, 8)])
def test_iso_c_equals_the_dense_definition(ranks: tuple[int, ...]) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    expected = 0.5 * common([w * dense(f) for w, f in zip(weights, experts, strict=True)])
    found = iso_c(experts, weights, scale=0.5)
    assert np.abs(dense(found) - expected).max() < 1e-5
    assert found.rank == min(sum(ranks), 12)


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (4, 4), (8, 8, 8)])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_equals_the_dense_definition(ranks: tuple[int, ...], fraction: float) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    expected = 0.5 * with_specific([w * dense(f) for w, f in zip(weights, experts, strict=True)], fraction)
    found = iso_cts(experts, weights, common_space_fraction=fraction, scale=0.5)
    assert np.abs(dense(found) - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
    assert found.rank <= min(sum(ranks), 12)


def test_all_singular_values_are_the_mean_over_the_support() -> None:
    experts = [factors(0, 2), factors(1, 3)]
    sigma = np.linalg.svd(sum(dense(f) for f in experts))[1]
    found = np.linalg.svd(dense(iso_c(experts, [1.0, 1.0])))[1]
    assert np.allclose(found[:5], sigma[:5].mean(), rtol=1e-5)
    assert np.allclose(found[5:], 0.0, atol=1e-5)


def test_with_the_whole_space_common_iso_cts_is_iso_c() -> None:
    experts = [factors(0, 2), factors(1, 3)]
    whole = iso_cts(experts, [1.0, -0.5], common_space_fraction=1.0)
    assert np.abs(dense(whole) - dense(iso_c(experts, [1.0, -0.5]))).max() < 1e-5


@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_an_update_of_zeros_does_not_count(method: object) -> None:
    zero, f = Factors(torch.zeros(2, 14), torch.zeros(12, 2)), factors(0, 2)
    assert np.abs(dense(method([zero, f], [1.0, 1.0])) - dense(method([f], [1.0]))).max() < 1e-6


def test_experts_that_cancel_leave_nothing_of_iso_c() -> None:
    f = factors(0, 2)
    assert iso_c([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0]).rank == 0
    assert not dense(iso_c([f], [1.0], scale=0.0)).any()
