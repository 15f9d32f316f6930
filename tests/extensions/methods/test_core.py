"""The spectral methods iso_c, iso_cts and tsv against dense decompositions, and what all that share a basis keep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave import registry
from loraweave.composer.merge.method_call import terms
from loraweave.extensions.methods.methods._core import clean, joint, shared_basis, spectra
from loraweave.extensions.methods.methods.iso_c import iso_c
from loraweave.extensions.methods.methods.iso_cts import iso_cts
from loraweave.extensions.methods.methods.tsv import tsv
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def test_the_basis_spans_and_is_orthonormal_and_has_its_largest_entries_positive() -> None:
    experts = [factors(0, 2), factors(1, 3), factors(0, 2)]
    experts_S = joint(spectra(terms(experts, [1.0, -3.0, 0.1])))
    basis, inside = shared_basis(experts_S.u_OS, experts_S.s_S)
    assert torch.allclose(basis @ inside, experts_S.u_OS, atol=1e-12)
    assert basis.shape == (9, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(5).double(), atol=1e-12)
    assert bool((basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all())
    u = np.linalg.svd(np.hstack([dense(f) for f in experts]))[0][:, :5]
    assert np.abs(np.abs(u.T @ basis.numpy()) - np.eye(5)).max() < 1e-6


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv"])
def test_inputs_that_no_expert_sees_stay_unseen(name: str) -> None:
    experts = [factors(0, 2), factors(1, 2)]
    unseen = np.linalg.svd(np.vstack([f.a_RI.double().numpy() for f in experts]))[2][4:].T
    assert np.abs(dense(registry.get("methods", name)(experts, [1.0, 1.0])) @ unseen).max() < 1e-5


@pytest.mark.parametrize(("name", "options"), [("tsv", {}), ("wudi", {"minimiser": "exact"})])
def test_an_equal_update_in_other_factors_is_the_same_update(name: str, options: dict[str, str]) -> None:
    f = factors(0, 3)
    turn = (torch.randn(3, 3, generator=torch.Generator().manual_seed(7)) + 3 * torch.eye(3)).double()
    split = Factors((turn @ f.a_RI.double()).float(), (f.b_OR.double() @ torch.linalg.inv(turn)).float())
    assert np.abs(dense(registry.get("methods", name)([f, split], [1.0, 1.0], **options)) - dense(f)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "scale"),
    [("iso_c", 2.0), ("iso_cts", 2.0), ("tsv", 2.0), ("robust_merge", 2.0), ("wudi", None), ("lego", None)],
)
def test_biases_are_summed_with_weights_and_scaled(name: str, scale: float | None) -> None:
    experts = [factors(0, 2, bias_O=torch.ones(9)), factors(1, 1), factors(2, 1, bias_O=torch.ones(9))]
    options = {} if scale is None else {"scale": scale}
    found = registry.get("methods", name)(experts, [0.5, 1.0, 2.0], **options)
    assert torch.equal(found.bias_O, torch.full((9,), 2.5 * (scale or 1.0)))


wide = partial(random_factors, num_out=12, num_in=14)


def svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The compact SVD: null directions left out."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    keep = s > 1e-5 * max(s[0], 1e-30)
    return u[:, keep], s[keep], vh[keep]


def polar(x: np.ndarray) -> np.ndarray:
    """The polar factor from one SVD, null directions left out."""
    u, _, vh = svd(x)
    return u @ vh


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
    return np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (8, 8, 8)])
def test_iso_c_equals_the_dense_definition(ranks: tuple[int, ...]) -> None:
    experts, weights = [wide(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    expected = 0.5 * common([w * dense(f) for w, f in zip(weights, experts, strict=True)])
    found = iso_c(experts, weights, scale=0.5)
    assert np.abs(dense(found) - expected).max() < 1e-5
    assert found.rank == min(sum(ranks), 12)


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 3), (4, 4), (8, 8, 8)])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_equals_the_dense_definition(ranks: tuple[int, ...], fraction: float) -> None:
    experts, weights = [wide(seed, rank) for seed, rank in enumerate(ranks)], [0.7, -0.4, 2.0][: len(ranks)]
    expected = 0.5 * with_specific([w * dense(f) for w, f in zip(weights, experts, strict=True)], fraction)
    found = iso_cts(experts, weights, common_space_fraction=fraction, scale=0.5)
    assert np.abs(dense(found) - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
    assert found.rank <= min(sum(ranks), 12)


def test_all_singular_values_are_the_mean_over_the_support() -> None:
    experts = [wide(0, 2), wide(1, 3)]
    sigma = np.linalg.svd(sum(dense(f) for f in experts))[1]
    found = np.linalg.svd(dense(iso_c(experts, [1.0, 1.0])))[1]
    assert np.allclose(found[:5], sigma[:5].mean(), rtol=1e-5)
    assert np.allclose(found[5:], 0.0, atol=1e-5)


def test_with_the_whole_space_common_iso_cts_is_iso_c() -> None:
    experts = [wide(0, 2), wide(1, 3)]
    whole = iso_cts(experts, [1.0, -0.5], common_space_fraction=1.0)
    assert np.abs(dense(whole) - dense(iso_c(experts, [1.0, -0.5]))).max() < 1e-5


@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_iso_does_not_count_an_update_of_zeros(method: object) -> None:
    zero, f = Factors(torch.zeros(2, 14), torch.zeros(12, 2)), wide(0, 2)
    assert np.abs(dense(method([zero, f], [1.0, 1.0])) - dense(method([f], [1.0]))).max() < 1e-6


def test_experts_that_cancel_leave_nothing_of_iso_c() -> None:
    f = wide(0, 2)
    assert iso_c([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0]).rank == 0
    assert not dense(iso_c([f], [1.0], scale=0.0)).any()


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
def test_tsv_equals_the_dense_definition(ranks: tuple[int, ...], k: int) -> None:
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


def test_coordinates_of_a_millionth_of_the_largest_are_zeros() -> None:
    x = torch.tensor([-1.0, 2.0**-19, -(2.0**-20), 2.0**-21, 0.0]).double()
    for size in (1.0, 2.0**40, 2.0**-40):
        assert (clean(size * x) / size).tolist() == [-1.0, 2.0**-19, 0.0, 0.0, 0.0]
    assert clean(x[:0]).shape == (0,)
