"""Truncation against the dense SVD in float64, above all where Gram matrices lose digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import unit
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.errors import AdapterUnsupported
from loraweave.lowrank.algebra import (
    components,
    compress,
    compress_sum,
    summed_by_owner,
    top_eigenpairs,
)
from loraweave.types import Factors

OUT, IN = 23, 31
# the most that a product of two factors, one of which is orthogonal, changes where both are rounded to fp32, in parts of it
ROUNDED = 2 * unit(torch.float32)


def generator(seed):
    return np.random.default_rng(seed)


def factors(seed, rank, outputs=OUT, inputs=IN):
    return random_factors(seed, rank, outputs, inputs)


def stacked(*terms):
    return Factors(torch.cat([term.a_RI for term in terms]), torch.cat([term.b_OR for term in terms], dim=1))


def scaled(term, weight):
    return Factors(term.a_RI, term.b_OR * weight)


def truth(matrix, rank):
    """The dense truncation and its relative error."""
    u, sigma, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank], np.linalg.norm(sigma[rank:]) / max(np.linalg.norm(sigma), 1e-300)


def with_spectrum(sigma, seed=0):
    """b a with those singular values, as float64 factors whose products are far from balanced."""
    draw, rank = generator(seed), len(sigma)
    left, right = (np.linalg.qr(draw.standard_normal((size, rank)))[0] for size in (OUT, IN))
    return Factors(torch.from_numpy(right.T.copy()), torch.from_numpy(left * np.asarray(sigma)))


def distance(found, expected, size):
    return np.linalg.norm(dense(found) - expected) / size


@pytest.mark.parametrize(("outputs", "inputs"), [(23, 31), (31, 23), (7, 40), (40, 7), (63, 100)])
@pytest.mark.parametrize(("stack", "rank"), [(6, 2), (20, 5), (22, 1), (30, 7), (90, 3)])
def test_stacks_taller_and_flatter_than_the_layer_are_cut_to_the_dense_optimum(outputs, inputs, stack, rank):
    update = factors(0, stack, outputs, inputs)
    small, error = compress(update, rank)
    expected, best = truth(dense(update), rank)
    assert small.rank == rank
    assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
    assert error == pytest.approx(best, rel=1e-9)


def test_a_stack_of_many_rows_needs_a_part_of_the_eigenvectors_only():
    update = factors(1, 100, 150, 170)
    small, error = compress(update, 8)
    expected, best = truth(dense(update), 8)
    assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
    assert error == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_an_expert_given_twice_is_that_expert_with_both_weights(weight, rank):
    expert = factors(2, 4)
    small, error = compress(stacked(expert, scaled(expert, weight)), rank)
    expected, best = truth((1 + weight) * dense(expert), rank)
    assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
    # fp32 experts of rank 4: what is beyond that is zero
    assert error == pytest.approx(best, rel=1e-7, abs=1e-14)


def test_opposite_experts_leave_nothing_beyond_the_rounding_of_what_cancelled():
    expert = factors(3, 5)
    small, error = compress(stacked(expert, scaled(expert, -1.0)), 3)
    assert np.isfinite(error)
    assert 0.0 <= error <= 1.0
    assert np.linalg.norm(dense(small)) < 1e-13 * np.linalg.norm(dense(expert))


def test_what_experts_that_nearly_cancel_leave_is_right():
    expert, rest = factors(4, 5), factors(5, 3)
    update = stacked(expert, scaled(expert, -1.0), scaled(rest, 1e-5))
    small, error = compress(update, 2)
    expected, best = truth(1e-5 * dense(rest), 2)
    # 1e-15 of what cancelled is 1e-10 of what is left; the weighted rest was rounded to fp32, too
    assert distance(small, expected, np.linalg.norm(expected)) <= 2 * ROUNDED
    assert error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("rank", [1, 3, 8, 12, 16])
def test_singular_values_over_eight_decades_are_right_to_the_rounding_of_the_largest(rank, size):
    update = with_spectrum(size * np.logspace(0, -8, 17))
    small, error = compress(update, rank)
    expected, best = truth(dense(update), rank)
    assert distance(small, expected, size) < 1e-8
    assert error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("tail", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_the_error_is_accurate_when_it_is_tiny(tail, size):
    _, error = compress(with_spectrum(size * np.array([1.0, 0.9, 0.8, tail, tail / 2])), 3)
    assert error == pytest.approx(tail * (1.25 / 2.45) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("gauge", [1e-6, 1e6])
def test_how_size_is_spread_over_the_factors_does_not_matter(gauge):
    update = factors(6, 9)
    stretch = torch.logspace(0, float(np.log10(gauge)), 9)
    other = Factors(update.a_RI * stretch[:, None], update.b_OR / stretch)
    expected, best = truth(dense(other), 4)
    small, error = compress(other, 4)
    assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
    assert error == pytest.approx(best, rel=1e-7)


def test_equal_singular_values_at_the_cut_keep_as_much_as_any_choice_among_them():
    update = with_spectrum([2.0, 1.0, 1.0, 1.0, 1.0])
    small, error = compress(update, 3)
    assert error == pytest.approx((2 / 8) ** 0.5, rel=1e-9)
    assert np.linalg.norm(dense(update) - dense(small)) == pytest.approx(2**0.5, rel=1e-7)


@pytest.mark.parametrize("stack", [9, 40])
def test_factors_are_balanced_orthogonal_and_of_one_sign(stack):
    small, _ = compress(factors(7, stack), 4)
    a, b = small.a_RI.double().numpy(), small.b_OR.double().numpy()
    np.testing.assert_allclose(a @ a.T, b.T @ b, rtol=1e-5, atol=1e-5 * np.linalg.norm(a) ** 2)
    assert np.abs(a @ a.T - np.diag(np.diag(a @ a.T))).max() < 1e-5 * np.linalg.norm(a) ** 2
    assert all(column[np.abs(column).argmax()] > 0 for column in b.T)
    assert (np.diff(np.linalg.norm(b, axis=0)) <= 0).all()


def test_the_sign_of_the_experts_basis_does_not_show_in_the_factors():
    update = factors(8, 6)
    flipped = Factors(-update.a_RI.flip(0), -update.b_OR.flip(1))
    small, other = compress(update, 2)[0], compress(flipped, 2)[0]
    torch.testing.assert_close(small.a_RI, other.a_RI, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.b_OR, other.b_OR, rtol=1e-5, atol=1e-5)


def test_a_result_shares_no_memory_with_the_update():
    update = factors(9, 6)
    before = update.a_RI.clone(), update.b_OR.clone()
    small, _ = compress(update, 3)
    small.a_RI.zero_()
    small.b_OR.zero_()
    assert torch.equal(update.a_RI, before[0])
    assert torch.equal(update.b_OR, before[1])


def test_huge_and_tiny_updates_are_as_exact_as_others():
    for size in (1e-18, 1e15):
        update = factors(10, 8)
        update = Factors(update.a_RI * size, update.b_OR * size)
        expected, best = truth(dense(update), 3)
        small, error = compress(update, 3)
        assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
        assert error == pytest.approx(best, rel=1e-9)


def test_a_sum_is_cut_before_its_weighted_factors_are_rounded():
    experts = [factors(seed, 4) for seed in range(3)]
    weights = [0.3, -0.7, 1.1]
    exact = sum(weight * dense(expert) for weight, expert in zip(weights, experts, strict=True))
    expected, best = truth(exact, 3)
    small, error, _ = compress_sum(experts, weights, 3)
    assert distance(small, expected, np.linalg.norm(expected)) <= ROUNDED
    assert error == pytest.approx(best, rel=1e-9)


def test_a_sum_of_few_rank_rows_is_exact_and_gains_and_biases_sum_with_the_weights():
    first, second = factors(0, 2), factors(1, 3)
    bias, gain = torch.arange(OUT).float(), torch.ones(OUT)
    first = Factors(first.a_RI, first.b_OR, bias_O=bias)
    second = Factors(second.a_RI, second.b_OR, bias_O=bias, gain_O=gain)
    for rank in (5, 2):
        total, error, _ = compress_sum([first, second], [0.5, -2.0], rank)
        assert total.rank == rank
        torch.testing.assert_close(total.bias_O, -1.5 * bias)
        torch.testing.assert_close(total.gain_O, -2.0 * gain)
        assert (error == 0.0) == (rank == 5)
        assert torch.equal(total.a_RI, torch.cat([first.a_RI, second.a_RI])) == (rank == 5)
    exact, _, _ = compress_sum([first, second], [0.5, -2.0], 9)
    np.testing.assert_allclose(dense(exact), 0.5 * dense(first) - 2.0 * dense(second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_sum_cut_to_no_rank_is_refused(rank):
    with pytest.raises(AdapterUnsupported, match=f"rank is {rank}; it must be at least 1"):
        compress_sum([factors(0, 2)], [1.0], rank)


@pytest.mark.parametrize("ranks", [(2, 3), (1, 0, 2), (0, 2, 0), (0, 0)])
def test_the_entries_of_a_product_are_summed_by_the_updates_that_own_rows_and_columns(ranks):
    product = generator(0).standard_normal((sum(ranks), sum(ranks)))
    owners = np.repeat(np.arange(len(ranks)), ranks)
    expected = [[product[np.ix_(owners == i, owners == j)].sum() for j in range(len(ranks))] for i in range(len(ranks))]
    sums = summed_by_owner(product, ranks)
    assert sums.dtype == product.dtype
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-14)


def test_the_cut_of_a_sum_says_the_inner_products_of_its_weighted_updates():
    experts, weights = [factors(0, 2), factors(1, 3), factors(2, 1)], [0.3, -0.7, 1.1]
    deltas = [weight * dense(expert) for expert, weight in zip(experts, weights, strict=True)]
    expected = [[(one * other).sum() for other in deltas] for one in deltas]
    np.testing.assert_allclose(compress_sum(experts, weights, 2).inner_EE, expected, rtol=1e-10)
    # a sum that is as tall as the layer is cut from the dense update, which has none of them
    assert compress_sum([factors(3, 12), factors(4, OUT - 12)], [1.0, 1.0], 2).inner_EE is None


@pytest.mark.parametrize(("rank", "outputs", "inputs"), [(3, 5, 7), (9, 4, 6), (1, 3, 2)])
def test_components_are_the_singular_triplets_and_gain_and_bias_stay_with_the_first(rank, outputs, inputs):
    update = factors(11, rank, outputs, inputs)
    update = Factors(update.a_RI, update.b_OR, torch.ones(outputs), torch.arange(outputs).float())
    parts = components(update)
    u, sigma, vh = np.linalg.svd(dense(update), full_matrices=False)
    assert len(parts) == min(rank, outputs, inputs)
    for place, part in enumerate(parts):
        expected = sigma[place] * np.outer(u[:, place], vh[place])
        np.testing.assert_allclose(dense(part), expected, atol=ROUNDED * sigma[0])
        assert (part.a_RI.dtype, part.b_OR.dtype) == (torch.float32, torch.float32)
        assert (part.gain_O is update.gain_O) == (part.bias_O is update.bias_O) == (place == 0)
        assert place == 0 or (part.gain_O is None and part.bias_O is None)


def test_an_update_of_rank_zero_is_its_only_component():
    update = Factors(torch.zeros(0, 4), torch.zeros(3, 0), bias_O=torch.ones(3))
    assert components(update) == [update]


@pytest.mark.parametrize("part", ["magnitude_O", "base_bias_O"])
def test_an_update_that_needs_its_base_layer_has_no_components(part):
    update = factors(0, 2)
    with pytest.raises(AdapterUnsupported, match="bound_pool"):
        components(Factors(update.a_RI, update.b_OR, **{part: torch.ones(OUT)}))


@pytest.mark.parametrize(("size", "rank"), [(7, 2), (90, 5), (90, 60), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_eigenpairs_fall_and_have_the_precision_of_the_matrix(size, rank, dtype):
    root = generator(0).standard_normal((size, size))
    symmetric = (root @ root.T).astype(dtype)
    expected = np.linalg.eigvalsh(symmetric.astype(np.float64))[::-1][:rank]
    values, vectors = top_eigenpairs(np.array(symmetric, order="F"), rank)
    assert values.dtype == vectors.dtype == dtype
    # backward stable: off by the rounding of as many terms, in parts of the largest
    bound = size * np.finfo(dtype).eps * expected[0]
    np.testing.assert_allclose(values, expected, atol=bound)
    np.testing.assert_allclose(symmetric @ vectors, vectors * values, atol=bound)
