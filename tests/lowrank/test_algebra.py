"""The low-rank algebra against the dense formulas, written anew in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dense_array as dense

from loraweave.errors import AdapterSuspicious, AdapterUnsupported, LayerMismatch
from loraweave.lowrank import algebra
from loraweave.types import Factors

SIZES = st.sampled_from([1, 2, 3, 7, 13])
SEEDS = st.integers(0, 2**16)


def flat(seed):
    return [number for part in seed for number in flat(part)] if isinstance(seed, tuple) else [seed]


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(flat(seed)).standard_normal(shape))


def factors(seed, rank=3, outputs=5, inputs=7, **parts):
    return Factors(random((seed, 0), rank, inputs), random((seed, 1), outputs, rank), **parts)


@given(st.integers(0, 2**16), SIZES, SIZES, SIZES)
@settings(max_examples=30, deadline=None)
def test_a_product_is_a_core_between_orthonormal_columns(seed, rank, outputs, inputs):
    found = factors(seed, rank, outputs, inputs)
    q, core, p = (part.numpy() for part in algebra.orthonormal(found.a_RI, found.b_OR))
    np.testing.assert_allclose(q @ core @ p.T, dense(found), atol=1e-9)
    for columns in (q, p):
        np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-9)


def changed_gauge(found, seed):
    """The same update b a written as (b R^-1)(R a), R far from orthogonal."""
    rotation = torch.linalg.qr(random((seed, 2), found.rank, found.rank)).Q
    stretch = torch.linspace(0.1, 10.0, found.rank, dtype=torch.float64)
    mixing = rotation * stretch
    return Factors(mixing @ found.a_RI, found.b_OR @ torch.linalg.inv(mixing))


def base_output(x, weight, bias):
    return x @ weight.T + bias


def test_delta_is_b_times_a_in_fp32():
    found = algebra.delta(factors(0))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), dense(factors(0)), rtol=1e-5, atol=1e-5)


@given(SEEDS, SIZES, SIZES, SIZES, st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_scale_multiplies_the_update_once(seed, rank, outputs, inputs, weight):
    update = factors(seed, rank, outputs, inputs)
    np.testing.assert_allclose(dense(algebra.scale(update, weight)), weight * dense(update), atol=1e-12)


def test_scale_multiplies_gain_and_bias_too():
    update = algebra.scale(factors(0, gain_O=random(1, 5), bias_O=random(2, 5)), -0.3)
    np.testing.assert_allclose(update.gain_O, -0.3 * random(1, 5).numpy())
    np.testing.assert_allclose(update.bias_O, -0.3 * random(2, 5).numpy())


def test_negate_added_to_the_update_is_zero():
    update = factors(0, bias_O=random(1, 5), gain_O=random(2, 5))
    total = algebra.add([update, algebra.negate(update)])
    np.testing.assert_allclose(dense(total), 0.0, atol=1e-12)
    assert algebra.is_zero(Factors(total.a_RI[:0], total.b_OR[:, :0], total.gain_O, total.bias_O))


@given(SEEDS, st.lists(SIZES, min_size=1, max_size=4), SIZES, SIZES)
@settings(max_examples=40, deadline=None)
def test_add_is_the_dense_sum_and_ranks_add_up(seed, ranks, outputs, inputs):
    terms = [factors((seed, index), rank, outputs, inputs) for index, rank in enumerate(ranks)]
    total = algebra.add(terms)
    assert total.rank == sum(ranks)
    np.testing.assert_allclose(dense(total), sum(dense(term) for term in terms), atol=1e-10)


def test_add_sums_the_gains_and_biases_that_are_there():
    total = algebra.add([factors(0, bias_O=random(1, 5)), factors(2), factors(3, bias_O=random(4, 5), gain_O=random(5, 5))])
    np.testing.assert_allclose(total.bias_O, random(1, 5) + random(4, 5))
    np.testing.assert_allclose(total.gain_O, random(5, 5))


def test_add_of_updates_without_bias_has_none():
    assert algebra.add([factors(0), factors(1)]).bias_O is None


@pytest.mark.parametrize(
    "other",
    [factors(1, outputs=4), factors(1, inputs=6), factors(1, kind="embedding"), factors(1, kind="conv", kernel=(1, 7))],
)
def test_add_refuses_updates_of_another_shape_or_kind_and_shows_both(other):
    with pytest.raises(LayerMismatch, match=r"\(5, 7, 'linear', \(\)\)"):
        algebra.add([factors(0), other])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_updates_are_alike_if_none_of_them_has_another_shape(place):
    terms = [factors(0), factors(1), factors(2)]
    algebra.require_alike(terms)
    algebra.require_alike(terms[:1])
    terms[place] = factors(3, outputs=4)
    with pytest.raises(LayerMismatch):
        algebra.require_alike(terms)


@given(SEEDS, SIZES, SIZES, SIZES, SIZES)
@settings(max_examples=40, deadline=None)
def test_inner_is_the_sum_over_elements_of_the_dense_product(seed, left_rank, right_rank, outputs, inputs):
    left, right = factors((seed, 0), left_rank, outputs, inputs), factors((seed, 1), right_rank, outputs, inputs)
    expected = float((dense(left) * dense(right)).sum())
    assert algebra.inner(left, right) == pytest.approx(expected, rel=1e-10, abs=1e-9)


@given(SEEDS, SIZES, SIZES, SIZES)
@settings(max_examples=40, deadline=None)
def test_norm_is_the_dense_frobenius_norm(seed, rank, outputs, inputs):
    update = factors(seed, rank, outputs, inputs)
    assert algebra.norm(update) == pytest.approx(np.linalg.norm(dense(update)), rel=1e-10)


def test_the_norm_of_updates_that_cancel_is_zero_and_not_nan():
    update = factors(0)
    total = algebra.add([update, algebra.negate(update)])
    assert algebra.norm(total) == pytest.approx(0.0, abs=1e-6)


@given(SEEDS, SIZES, SIZES, SIZES, st.sampled_from([1, 2, 3, 6, 12]))
@settings(max_examples=60, deadline=None)
def test_compress_is_the_best_approximation_and_its_error_that_of_the_dense_svd(seed, rank, outputs, inputs, keep):
    update = factors(seed, rank, outputs, inputs)
    small, error = algebra.compress(update, keep)
    sigma = np.linalg.svd(dense(update), compute_uv=False)
    best = np.sqrt((sigma[keep:] ** 2).sum() / (sigma**2).sum())
    assert small.rank <= max(keep, 1)
    # where nothing is cut, both are rounding
    assert error == pytest.approx(best, rel=1e-7, abs=1e-12)
    difference = np.linalg.norm(dense(update) - dense(small)) / np.linalg.norm(dense(update))
    assert difference == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_compress_to_the_own_rank_gives_the_update_back_itself():
    update = factors(0, rank=3)
    assert algebra.compress(update, 3) == (update, 0.0)
    assert algebra.compress(update, 9) == (update, 0.0)


@pytest.mark.parametrize(("outputs", "inputs"), [(2, 9), (9, 2), (1, 1)])
def test_compress_of_more_rank_rows_than_outputs_or_inputs_loses_nothing(outputs, inputs):
    update = factors(0, rank=11, outputs=outputs, inputs=inputs)
    small, error = algebra.compress(update, 10)
    assert small.rank == min(outputs, inputs)
    assert error == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(dense(small), dense(update), atol=1e-10)


def test_compress_keeps_dtype_kind_gain_and_bias():
    update = Factors(
        random(0, 4, 18).float(), random(1, 5, 4).float(), random(2, 5), random(3, 5), kind="conv", kernel=(3, 3)
    )
    small, _ = algebra.compress(update, 2)
    assert (small.a_RI.dtype, small.b_OR.dtype) == (torch.float32, torch.float32)
    assert (small.kind, small.kernel) == ("conv", (3, 3))
    assert small.gain_O is update.gain_O
    assert small.bias_O is update.bias_O


def test_compress_of_nothing_is_nothing_with_no_error():
    update = Factors(torch.zeros(3, 7), torch.zeros(5, 3))
    small, error = algebra.compress(update, 1)
    assert error == 0.0
    assert not dense(small).any()


@pytest.mark.parametrize("rank", [0, -1])
def test_compress_to_no_rank_is_refused(rank):
    with pytest.raises(AdapterUnsupported, match=f"rank is {rank}; it must be at least 1"):
        algebra.compress(factors(0), rank)


@given(SEEDS, SIZES, SIZES, SIZES)
@settings(max_examples=30, deadline=None)
def test_how_an_update_is_split_into_factors_changes_no_figure(seed, rank, outputs, inputs):
    update, other = factors((seed, 0), rank, outputs, inputs), factors((seed, 1), rank, outputs, inputs)
    same = changed_gauge(update, seed)
    scale = algebra.norm(update) * algebra.norm(other)
    assert algebra.norm(same) == pytest.approx(algebra.norm(update), rel=1e-9)
    assert algebra.inner(same, other) == pytest.approx(algebra.inner(update, other), abs=1e-9 * scale)
    small, error = algebra.compress(update, 1)
    small_too, error_too = algebra.compress(same, 1)
    assert error_too == pytest.approx(error, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(dense(small_too), dense(small), atol=1e-6 * algebra.norm(update))


@given(SEEDS, SIZES, SIZES, SIZES)
@settings(max_examples=30, deadline=None)
def test_a_bound_dora_gives_the_output_of_its_formula(seed, rank, outputs, inputs):
    # y = m / |W + b a| (row norms) * (W + b a) x + bias
    weight, bias, x = random((seed, 5), outputs, inputs), random((seed, 6), outputs), random((seed, 7), 4, inputs)
    magnitude = random((seed, 8), outputs).abs() + 0.1
    update = factors(seed, rank, outputs, inputs, magnitude_O=magnitude)
    bound = algebra.bind(update, weight, bias)
    merged = weight.numpy() + dense(update)
    expected = x.numpy() @ (merged * (magnitude.numpy() / np.linalg.norm(merged, axis=1))[:, None]).T + bias.numpy()
    y0 = x @ weight.T
    found = base_output(x, weight, bias) + x @ bound.a_RI.T @ bound.b_OR.double().T + bound.gain_O.double() * y0
    assert bound.bound
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_dora_whose_magnitude_is_the_norm_of_the_merged_weight_is_a_plain_lora():
    weight, update = random(0, 5, 7), factors(1)
    magnitude = torch.from_numpy(np.linalg.norm(weight.numpy() + dense(update), axis=1))
    bound = algebra.bind(factors(1, magnitude_O=magnitude), weight, None)
    np.testing.assert_allclose(bound.gain_O, 0.0, atol=1e-7)
    np.testing.assert_allclose(dense(bound), dense(update), rtol=1e-5, atol=1e-6)


def test_a_dora_beside_a_weight_that_it_takes_back_is_refused_with_the_row():
    update = factors(1, magnitude_O=torch.ones(5))
    weight = random(0, 5, 7)
    weight[[3, 4]] = -(update.b_OR @ update.a_RI)[[3, 4]]
    with pytest.raises(AdapterUnsupported, match="which is 0 in row 3 of"):
        algebra.bind(update, weight, None)


def test_the_binding_of_a_dora_does_not_depend_on_its_gauge():
    weight, magnitude, update = random(0, 5, 7), random(1, 5).abs(), factors(2)
    one = algebra.bind(Factors(update.a_RI, update.b_OR, magnitude_O=magnitude), weight, None)
    same = changed_gauge(update, 3)
    other = algebra.bind(Factors(same.a_RI, same.b_OR, magnitude_O=magnitude), weight, None)
    np.testing.assert_allclose(other.gain_O, one.gain_O, rtol=1e-5)
    np.testing.assert_allclose(dense(other), dense(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [None, random(3, 5)])
def test_a_trained_base_bias_becomes_its_difference_to_the_base(base):
    trained, extra = random(1, 5).float(), random(2, 5).float()
    bound = algebra.bind(factors(0, base_bias_O=trained, bias_O=extra), random(4, 5, 7), base)
    expected = trained.double() - (0.0 if base is None else base) + extra
    np.testing.assert_allclose(bound.bias_O, expected, atol=1e-6)


def test_binding_what_is_bound_gives_it_back_itself():
    update = factors(0, bias_O=random(1, 5))
    assert algebra.bind(update, random(2, 5, 7), None) is update


@pytest.mark.parametrize(("part", "word"), [("magnitude_O", "magnitude"), ("base_bias_O", "base bias")])
@pytest.mark.parametrize(
    "call", [algebra.delta, algebra.negate, lambda f: algebra.add([f, f]), lambda f: algebra.scale(f, 2.0)]
)
def test_an_update_that_needs_the_base_layer_is_refused_with_the_way_out(part, word, call):
    with pytest.raises(AdapterUnsupported, match=f"{word} needs the base layer: bind"):
        call(factors(0, **{part: random(1, 5)}))


@pytest.mark.parametrize("part", ["gain_O", "bias_O", "magnitude_O", "base_bias_O"])
def test_once_an_update_alone_is_that_update_of_whatever_kind(part):
    update = factors(0, **{part: random(1, 5)})
    assert algebra.scale(update, 1.0) is update
    assert algebra.add([update]) is update


def test_an_update_with_a_gain_has_no_delta():
    with pytest.raises(AdapterUnsupported, match="gain"):
        algebra.delta(factors(0, gain_O=random(1, 5)))


@pytest.mark.parametrize(
    ("update", "zero"),
    [
        (factors(0), False),
        (Factors(torch.zeros(2, 3), torch.ones(4, 2)), True),
        (Factors(torch.zeros(2, 3), torch.ones(4, 2), bias_O=torch.zeros(4)), True),
        (Factors(torch.zeros(2, 3), torch.ones(4, 2), bias_O=torch.tensor([0.0, 0, 1e-30, 0])), False),
        (Factors(torch.zeros(2, 3), torch.ones(4, 2), gain_O=torch.ones(4)), False),
        (Factors(torch.zeros(2, 3), torch.ones(4, 2), magnitude_O=torch.ones(4)), False),
    ],
)
def test_an_update_is_zero_when_it_leaves_every_output_alone(update, zero):
    assert algebra.is_zero(update) is zero


def test_nothing_changes_its_operands():
    update, other = factors(0, bias_O=random(1, 5)), factors(2)
    copies = [tensor.clone() for found in (update, other) for tensor in found.tensors().values()]
    algebra.add([algebra.scale(update, 3.0), algebra.negate(other)])
    algebra.compress(update, 1)
    algebra.inner(update, other)
    tensors = [tensor for found in (update, other) for tensor in found.tensors().values()]
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_unbound_to_a_magnitude_and_bound_again_an_update_is_itself():
    generator = torch.Generator().manual_seed(3)
    a_RI, b_OR, gain_O, weight_OI = (torch.randn(*size, generator=generator) for size in ((2, 5), (7, 2), (7,), (7, 5)))
    gain_O[0], b_OR[0] = -1.0, 0.0
    factors = Factors(a_RI, b_OR, gain_O=gain_O)
    unbound = algebra.unbind(factors, weight_OI)
    # DoRA as published: m / |V| * V with V = W + b a
    v_OI = weight_OI.double() + unbound.b_OR.double() @ unbound.a_RI.double()
    dense_OI = unbound.magnitude_O.double()[:, None] * v_OI / v_OI.norm(dim=1, keepdim=True)
    wanted_OI = (1 + gain_O.double())[:, None] * weight_OI.double() + b_OR.double() @ a_RI.double()
    assert torch.allclose(dense_OI, wanted_OI, rtol=1e-5, atol=1e-6)
    again = algebra.bind(unbound, weight_OI, None)
    assert torch.allclose(again.gain_O, gain_O, atol=1e-6)
    assert torch.allclose(again.b_OR, b_OR, atol=1e-5)
    with pytest.raises(AdapterUnsupported, match="row 1"):
        algebra.unbind(Factors(a_RI, b_OR, gain_O=torch.full((7,), -1.0)), weight_OI)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_equals_a_look_at_every_value_also_where_infinities_cancel_or_the_sum_overflows(dtype):
    largest = torch.finfo(dtype).max
    for values in ([], [1.0, -2.0], [largest, largest], [math.inf, -math.inf], [0.0, math.nan], [-math.inf, 1.0]):
        tensor = torch.tensor(values, dtype=dtype)
        assert algebra.all_finite(tensor) is bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize(
    ("values", "within"),
    [([1.0, -2.0], True), ([1e18, 1e19], True), ([1e20, 1.0], False), ([math.inf, 1.0], False), ([math.nan, 0.0], False)],
)
def test_tensors_within_range_are_those_whose_norm_squared_fp32_holds(values, within):
    tensors = [torch.tensor([value]) for value in values]
    assert algebra.within_range(tensors) is within
    assert algebra.within_range([each.double() for each in tensors]) is within
    assert not algebra.within_range([torch.tensor([1])])
    # as views of one vector, which are looked at together, also where they are a part of it or overlap
    whole = torch.tensor([*values, 5.0])
    views = list(torch.split(whole, 1))
    assert algebra.within_range(views) is algebra.within_range([whole[:2], whole[1:]]) is within
    assert algebra.within_range(views[2:]) is True
    assert algebra.within_range([whole[2:], whole[2:].reshape(1, 1)]) is True


@pytest.mark.parametrize(("outputs", "inputs"), [(3, 7), (7, 3), (5, 5), (1, 1)])
@pytest.mark.parametrize("more", [-1, 0, 1, 6])
def test_within_sides_an_update_is_itself_or_the_product_beside_an_identity(outputs, inputs, more):
    side = min(outputs, inputs)
    update = factors(0, max(side + more, 1), outputs, inputs, bias_O=random(1, outputs))
    within = algebra.within_sides(update)
    if update.rank <= side:
        assert within is update
        return
    one, other = (within.b_OR, within.a_RI) if outputs <= inputs else (within.a_RI, within.b_OR)
    assert torch.equal(one, torch.eye(side, dtype=torch.float64))
    np.testing.assert_allclose(other, dense(update), atol=1e-12)
    assert within.bias_O is update.bias_O


@pytest.mark.parametrize(
    ("b_OR", "a_RI", "within"),
    [
        (torch.full((9, 1), 1e19), torch.full((1, 9), 1e19), True),
        (torch.full((2, 1), algebra.MAX_FP32), torch.ones(1, 1), True),
        # the sum of two terms of 2.25e38 is beyond fp32, and so is one on the way to 0
        (torch.full((1, 2), 1.5e19), torch.full((2, 1), 1.5e19), False),
        (torch.full((2, 2), 1.5e19), torch.tensor([[1.5e19], [-1.5e19]]), False),
        (torch.tensor([[1e20, 0.0]]), torch.tensor([[0.0], [1e20]]), True),
        (torch.tensor([[1e20, 1.0], [1e19, 1.0]]), torch.tensor([[1.0, 1e19], [1.0, 1.0]]), False),
        (torch.tensor([[math.inf]]), torch.tensor([[1.0]]), False),
    ],
)
def test_factors_are_in_range_when_no_sum_of_their_terms_is_beyond_fp32(b_OR, a_RI, within):
    if within:
        algebra.require_in_range(Factors(a_RI, b_OR), "expert 'x'")
        return
    with pytest.raises(AdapterSuspicious, match=r"expert 'x': .* beyond what fp32 holds"):
        algebra.require_in_range(Factors(a_RI, b_OR), "expert 'x'")


def test_on_host_a_tensor_is_itself_or_a_detached_copy_in_fp32():
    tensor = random(0, 3, 4).float()
    assert algebra.on_host(tensor) is tensor
    for other in (tensor.double(), tensor.bfloat16(), tensor.clone().requires_grad_()):
        host = algebra.on_host(other)
        assert not host.requires_grad
        assert torch.equal(host, other.detach().float())
        assert host.dtype == torch.float32
