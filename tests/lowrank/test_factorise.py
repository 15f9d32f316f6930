"""Factors of dense matrices against numpy's SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.lowrank import factorise as module
from loraweave.lowrank.factorise import energy_missed, factorise, filtered_subspace, top_subspace


def orthogonal(seed, rows, columns):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def with_spectrum(sigma, outputs, inputs):
    sigma = np.asarray(sigma, dtype=np.float64)
    left, right = orthogonal(0, outputs, len(sigma)), orthogonal(1, inputs, len(sigma))
    return torch.from_numpy((left * sigma) @ right.T).float()


def best_error(delta, rank):
    sigma = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    return np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)


def real_error(delta, a, b):
    exact = delta.double().numpy()
    return np.linalg.norm(exact - b.double().numpy() @ a.double().numpy()) / np.linalg.norm(exact)


@pytest.fixture(params=["Gram matrix", "subspace"], ids=str)
def way(request, monkeypatch):
    """Both ways on small matrices; which is taken for real depends on the size."""
    if request.param == "subspace":
        monkeypatch.setattr(module, "SMALL_SIDE", 0)
    return request.param


SPECTRA = {
    "flat": np.ones(90),
    "nearly flat": np.linspace(1.0, 0.99, 90),
    "slow decay": np.arange(1, 91) ** -0.5,
    "eight decades": np.logspace(0, -8, 90),
    "equal at the cut": np.r_[np.ones(40), np.full(50, 0.1)],
    "a cliff before the cut": np.r_[np.ones(4), np.full(4, 1e-3), np.full(82, 1e-6)],
    "low rank": np.r_[np.linspace(2, 1, 5), np.zeros(85)],
    "low rank and noise": np.r_[np.linspace(2, 1, 6), np.full(84, 1e-4)],
}


@pytest.mark.parametrize("shape", [(90, 133), (133, 90)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_that_of_the_best_approximation_and_is_reported_truly(way, spectrum, shape):
    delta = with_spectrum(SPECTRA[spectrum], *shape)
    a, b, error = factorise(delta, rank=6)
    best = best_error(delta, 6)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((6, shape[1]), (shape[0], 6), torch.float32, torch.float32)
    assert real_error(delta, a, b) == pytest.approx(best, rel=1e-6, abs=5e-7)
    assert error == pytest.approx(best, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 5, 12, 13, 29])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (31, 31)])
def test_any_rank_of_a_random_matrix_is_the_best_approximation(way, rank, shape):
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    a, b, error = factorise(delta, rank=rank)
    assert real_error(delta, a, b) == pytest.approx(best_error(delta, rank), rel=1e-6)
    assert error == pytest.approx(best_error(delta, rank), rel=1e-6)


def test_a_low_rank_matrix_comes_back_to_the_rounding_of_fp32(way):
    delta = with_spectrum([3.0, 2.0, 1.0], 60, 80)
    a, b, error = factorise(delta, rank=3)
    # what is beyond rank 3 is the rounding of delta's own entries
    assert error < 1e-7
    assert real_error(delta, a, b) < 2e-7


@pytest.mark.parametrize("max_error", [0.9, 0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("spectrum", ["slow decay", "eight decades", "low rank and noise"])
def test_max_error_takes_the_smallest_rank_within_it(way, spectrum, max_error):
    delta = with_spectrum(SPECTRA[spectrum], 90, 133)
    a, b, error = factorise(delta, max_error=max_error)
    errors = [best_error(delta, rank) for rank in range(91)]
    assert a.shape[0] == next(rank for rank in range(1, 91) if errors[rank] <= max_error * (1 + 1e-6))
    assert error <= max_error * (1 + 1e-6)
    assert real_error(delta, a, b) <= max_error + 3e-7


@pytest.mark.parametrize("sine", [1.0, 1e-2, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("sizes", [(1.0, 1e-6, 1e6, 1.0), (1e6, 1e6, 1e6, 1e6)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_basis_is_orthonormal_and_spans_the_columns_however_close_they_are(sine, dtype, sizes):
    draw = np.random.default_rng(0)
    columns = draw.standard_normal((50, 1)) + sine * draw.standard_normal((50, 4))
    columns = (columns * sizes).astype(dtype)
    basis = module._orthonormal(columns)
    assert basis.dtype == dtype
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-6)
    columns = columns / np.linalg.norm(columns, axis=0)
    np.testing.assert_allclose(basis @ (basis.T @ columns), columns, atol=1e-6)


def test_rank_wins_over_max_error():
    delta = with_spectrum(SPECTRA["slow decay"], 90, 133)
    a, _, error = factorise(delta, rank=4, max_error=1e-3)
    assert a.shape[0] == 4
    assert error == pytest.approx(best_error(delta, 4), rel=1e-6)


def test_an_error_that_is_reached_before_the_rank_takes_fewer():
    delta = with_spectrum([1.0, 0.5, 1e-3], 20, 30)
    assert factorise(delta, rank=20, max_error=0.01)[0].shape[0] == 2


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
@pytest.mark.parametrize("rank", [None, 9])
def test_without_a_limit_the_product_is_delta_bit_for_bit(shape, rank):
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    a, b, error = factorise(delta, rank=rank)
    assert torch.equal(b @ a, delta)
    assert error == 0.0


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"max_error": 0.1}])
def test_zeros_have_factors_of_rank_zero(options):
    a, b, error = factorise(torch.zeros(4, 6), **options)
    assert (a.shape, b.shape, error) == ((0, 6), (4, 0), 0.0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_the_entries_does_not_matter(way, size):
    delta = torch.randn(40, 60, generator=torch.Generator().manual_seed(2))
    a, b, error = factorise(delta * size, rank=4)
    assert error == pytest.approx(best_error(delta, 4), rel=1e-6)
    assert real_error(delta * size, a, b) == pytest.approx(error, rel=1e-6)


def test_it_is_the_same_every_time_and_columns_of_b_have_a_positive_largest_entry(way):
    delta = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    before = delta.clone()
    (a, b, _), (again_a, again_b, _) = factorise(delta, rank=5), factorise(delta, rank=5)
    assert torch.equal(a, again_a)
    assert torch.equal(b, again_b)
    assert torch.equal(delta, before)
    assert all(column[column.abs().argmax()] > 0 for column in b.T)


def test_a_matrix_in_columns_is_as_one_in_rows(way):
    delta = torch.randn(60, 40, generator=torch.Generator().manual_seed(4))
    a, b, _ = factorise(delta, rank=5)
    turned_a, turned_b, _ = factorise(delta.T.contiguous().T, rank=5)
    torch.testing.assert_close(b @ a, turned_b @ turned_a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 200])
@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (140, 150), (150, 140)])
@pytest.mark.parametrize("spectrum", ["slow decay", "low rank and noise", "eight decades"])
def test_in_whichever_blocks_a_matrix_is_read_the_approximation_is_the_best(monkeypatch, spectrum, shape, block):
    monkeypatch.setattr(module, "BLOCK", block)
    delta = with_spectrum(SPECTRA[spectrum][:60], *shape)
    for rank in (6, 50):
        a, b, error = factorise(delta, rank=rank)
        best = best_error(delta, rank)
        assert real_error(delta, a, b) == pytest.approx(best, rel=1e-6, abs=5e-7)
        assert error == pytest.approx(best, rel=1e-6, abs=1e-8)


# a power of two changes no digit, so it must not change what is believed either
@pytest.mark.parametrize("size", [2.0**-10, 1.0, 2.0**10])
@pytest.mark.parametrize("search", ["filtered_subspace", "top_eigenpairs"])
def test_fp32_is_not_believed_where_the_bound_does_not_show_the_error(monkeypatch, search, size):
    delta = size * with_spectrum(SPECTRA["flat"] + 0.1 * np.arange(90)[::-1], 90, 133)
    if search == "top_eigenpairs":
        monkeypatch.setattr(module, "filtered_subspace", lambda *given, **options: None)
    monkeypatch.setattr(module, search, _spoilt(getattr(module, search)))
    a, b, error = factorise(delta, rank=6)
    assert error == pytest.approx(best_error(delta, 6), rel=1e-9)
    assert real_error(delta, a, b) == pytest.approx(error, rel=1e-6)


def _spoilt(right):
    """Eigenvectors that are off by a few per cent whenever they were asked for in fp32."""

    def wrong(matrix, rank, **options):
        found = right(matrix, rank, **options)
        if matrix.dtype != np.float32:
            return found
        # vectors come first from one, second from the other
        return [_turned(each) if np.ndim(each) == 2 else each for each in found]

    return wrong


def _turned(vectors):
    noise = np.random.default_rng(6).standard_normal(vectors.shape, dtype=np.float32)
    return np.linalg.qr(vectors + 0.02 * noise)[0]


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_filter_finds_the_largest_eigenvalues_or_says_that_it_takes_too_long(spectrum):
    delta = with_spectrum(SPECTRA[spectrum], 90, 133).numpy()
    energy = float(np.square(delta, dtype=np.float64).sum())
    found = filtered_subspace(delta @ delta.T, 6, energy=energy)
    if found is not None:
        exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
        assert np.square(found[0].T.astype(np.float64) @ delta).sum() >= exact[:6].sum() - 1e-6 * energy
        assert found[1] <= exact[6] + 1e-6 * exact[0]
    assert (found is None) == (spectrum in ("nearly flat", "equal at the cut"))


def test_the_bound_holds_for_wrong_subspaces_and_is_tight_for_right_ones():
    draw = np.random.default_rng(5)
    symmetric = draw.standard_normal((20, 20))
    symmetric = symmetric @ symmetric.T
    values, vectors = np.linalg.eigh(symmetric)
    for tilt in (1e-6, 1e-3, 1e-1):
        basis, _ = np.linalg.qr(vectors[:, -3:] + tilt * draw.standard_normal((20, 3)))
        small, turn = np.linalg.eigh(basis.T @ symmetric @ basis)
        basis = basis @ turn
        residual = np.linalg.norm(symmetric @ basis - basis * small)
        other = np.linalg.svd(np.eye(20) - basis @ basis.T)[0][:, :17]
        gap = small[0] - np.linalg.eigvalsh(other.T @ symmetric @ other)[-1]
        missed = values[-3:].sum() - small.sum()
        assert -1e-9 <= missed <= energy_missed(residual, gap, 3) + 1e-9


@pytest.mark.parametrize(
    ("residual", "gap", "expected"),
    [(3.0, 8.0, 1.0), (3.0, 0.0, 3.0), (3.0, -8.0, 3.0), (0.0, 8.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_each_value_may_miss_what_the_papers_bound_says(residual, gap, expected):
    # 2 r^2 / (gap + sqrt(gap^2 + 4 r^2)); 8 and 6 are the sides of a 10
    assert energy_missed(residual, gap, 1) == expected
    assert energy_missed(residual, gap, 5) == 5 * expected


def test_a_subspace_too_large_for_the_search_is_refused():
    assert top_subspace(lambda x: x, 20, 16, energy=20.0) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_factors_of_any_dtype_are_fp32_and_whole_ones_give_delta_bit_for_bit(dtype, shape):
    delta_OI = torch.randn(shape, dtype=torch.float64).to(dtype)
    a_RI, b_OR, error = factorise(delta_OI)
    assert (a_RI.dtype, b_OR.dtype, error) == (torch.float32, torch.float32, 0.0)
    assert torch.equal(b_OR @ a_RI, delta_OI.float())
    zeros = factorise(torch.zeros_like(delta_OI))
    assert [factor.dtype for factor in zeros[:2]] == [torch.float32, torch.float32]
