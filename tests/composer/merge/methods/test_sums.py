"""linear, average, task_arithmetic and svd against dense sums in float64, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import pytest
import torch
from packaging.version import Version
from rounding import assert_near
from tiny_models import Make, dense
from tiny_models import random_factors as factors

from loraweave.composer.merge.method_call import TruncatedUpdate
from loraweave.composer.merge.methods._span import combination, gram, mean_weights, shares
from loraweave.composer.merge.methods.average import average
from loraweave.composer.merge.methods.linear import linear
from loraweave.composer.merge.methods.svd import svd
from loraweave.composer.merge.methods.task_arithmetic import task_arithmetic
from loraweave.errors import WeightingError
from loraweave.types import Factors


def whole(update: Factors | TruncatedUpdate) -> Factors:
    return update.factors if isinstance(update, TruncatedUpdate) else update


def close(found: Factors, expected: torch.Tensor) -> bool:
    return torch.allclose(dense(found), expected, rtol=1e-5, atol=1e-6)


def summed(experts: Sequence[Factors], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros(5, 7, dtype=torch.float64)
    for expert, weight in zip(experts, weights, strict=True):
        total += weight * dense(expert)
    return total


EXPERTS = [factors(0, 1), factors(1, 4), factors(2, 3)]


def test_the_average_is_the_sum_over_the_sum_of_weights() -> None:
    found = average(EXPERTS, [2.0, -1.0, 3.0])
    assert close(found, summed(EXPERTS, [2.0, -1.0, 3.0]) / 4.0)
    assert found.rank == 8


def test_only_the_proportions_of_an_average_count() -> None:
    assert torch.allclose(dense(average(EXPERTS, [1, 1, 1])), dense(average(EXPERTS, [7, 7, 7])), atol=1e-6)


def test_an_absent_layer_is_zero_in_the_average_and_its_weight_stays() -> None:
    assert close(average([EXPERTS[0], None], [1.0, 3.0]), dense(EXPERTS[0]) / 4.0)


def test_weights_that_sum_to_zero_have_no_average() -> None:
    with pytest.raises(WeightingError, match=r"1, -1 sum to 0: use task_arithmetic"):
        average(EXPERTS[:2], [1.0, -1.0])


def test_gains_and_biases_are_averaged_too() -> None:
    found = average([factors(0, 1, gain_O=torch.ones(5)), factors(1, 1, bias_O=torch.ones(5)), None], [1.0, 1.0, 2.0])
    assert torch.equal(found.gain_O, torch.full((5,), 0.25))
    assert torch.equal(found.bias_O, torch.full((5,), 0.25))


def test_task_arithmetic_scales_the_sum_once() -> None:
    assert close(task_arithmetic(EXPERTS, [1.0, 1.0, -1.0], scale=0.3), 0.3 * summed(EXPERTS, [1, 1, -1]))
    found = task_arithmetic([factors(0, 1, bias_O=torch.ones(5))], [2.0], scale=0.25)
    assert torch.equal(found.bias_O, torch.full((5,), 0.5))


def test_task_arithmetic_without_a_scale_is_linear() -> None:
    weights = [0.7, -0.4, 2.0]
    assert torch.equal(dense(task_arithmetic(EXPERTS, weights)), dense(linear(EXPERTS, weights)))


def test_a_scale_of_zero_leaves_an_update_of_rank_zero() -> None:
    found = task_arithmetic(EXPERTS, [1.0, 1.0, 1.0], scale=0.0)
    assert found.rank == 0
    assert not dense(found).any()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_truncated_decomposition_of_the_dense_sum(rank: int) -> None:
    weights = [0.7, -0.4, 2.0]
    u, sigma, vh = torch.linalg.svd(summed(EXPERTS, weights))
    found = svd(EXPERTS, weights, rank=rank).factors
    assert found.rank == rank
    assert close(found, u[:, :rank] * sigma[:rank] @ vh[:rank])


def test_svd_takes_the_largest_rank_that_counts_by_default() -> None:
    assert svd(EXPERTS, [1.0, 0.0, 1.0]).factors.rank == 3
    assert svd([*EXPERTS, None], [1.0, 1.0, 1.0, 1.0]).factors.rank == 4


def test_svd_at_a_high_rank_is_the_sum_itself() -> None:
    assert close(svd(EXPERTS, [1.0, 2.0, 3.0], rank=100).factors, summed(EXPERTS, [1, 2, 3]))


def test_svd_sums_gains_and_biases_exactly() -> None:
    found = svd([factors(0, 3, gain_O=torch.ones(5), bias_O=torch.ones(5)), factors(1, 3)], [0.5, 1.0], rank=1).factors
    assert torch.equal(found.gain_O, torch.full((5,), 0.5))
    assert torch.equal(found.bias_O, torch.full((5,), 0.5))


@pytest.mark.parametrize(("method", "peft_type"), [(linear, "cat"), (task_arithmetic, "cat"), (svd, "svd")])
def test_it_gives_the_same_delta_as_peft(method, peft_type: str, in_peft: Make) -> None:
    scalings, weights = [1.0, 2.5, 0.5], [0.7, 0.4, 1.3]
    model, experts = in_peft(scalings, [2, 3, 1])
    # peft before 0.21 multiplies by the scaling twice where it decomposes
    twice = peft_type == "svd" and Version(peft.__version__) < Version("0.21")
    weights_in_peft = [weight / scaling for weight, scaling in zip(weights, scalings, strict=True)] if twice else weights
    model.add_weighted_adapter(["0", "1", "2"], weights_in_peft, "merged", combination_type=peft_type)
    expected_OI = model.base_model.model.layer.get_delta_weight("merged").detach().double()
    # a decomposition is off by its size times the rounding of at most one term for each entry
    assert_near(dense(whole(method(experts, weights))), expected_OI, terms=expected_OI.numel(), dtype=torch.float32)


@pytest.mark.parametrize("method", [linear, average, task_arithmetic, svd])
@pytest.mark.parametrize("part", ["gain_O", "bias_O", "magnitude_O", "base_bias_O"])
def test_one_expert_of_weight_one_comes_back_whatever_its_kind(method, part: str) -> None:
    expert = factors(0, 2, **{part: torch.arange(5.0)})
    found = whole(method([None, expert, factors(1, 1)], [0.0, 1.0, 0.0]))
    given = expert.tensors()
    assert found.tensors().keys() == given.keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, given[name])
        assert tensor.data_ptr() != given[name].data_ptr()


def test_it_equals_the_sum_of_the_dense_updates() -> None:
    experts, weights = [factors(0, 1), factors(1, 4), factors(2, 3)], [0.7, -0.4, 2.0]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    found = linear(experts, weights)
    assert found.rank == 8
    assert torch.allclose(dense(found), expected, rtol=1e-6, atol=1e-6)


def test_half_and_half_of_one_adapter_is_that_adapter() -> None:
    f = factors(0, 3)
    assert torch.allclose(dense(linear([f, f], [0.35, 0.35])), 0.7 * dense(f), rtol=1e-6, atol=1e-6)


def test_gains_and_biases_sum_with_their_weights() -> None:
    gain, bias = torch.arange(5.0), torch.ones(5)
    found = linear([factors(0, 2, gain_O=gain), factors(1, 2, gain_O=gain, bias_O=bias), factors(2, 1)], [0.5, -2.0, 3.0])
    assert torch.equal(found.gain_O, -1.5 * gain)
    assert torch.equal(found.bias_O, -2.0 * bias)


def test_the_gram_matrix_has_the_inner_products_of_the_dense_updates() -> None:
    updates = [factors(0, 1), factors(1, 0), factors(2, 4), factors(3, 3)]
    deltas = [f.b_OR.double() @ f.a_RI.double() for f in updates]
    expected = torch.stack([torch.stack([(x * y).sum() for y in deltas]) for x in deltas])
    assert torch.allclose(gram(updates), expected, rtol=1e-13, atol=1e-13)


def test_a_combination_without_coefficients_has_rank_zero_and_the_layers_shape() -> None:
    found = combination([factors(0, 2)], [0.0])
    assert (found.a_RI.shape, found.b_OR.shape) == ((0, 7), (5, 0))


def test_weights_become_shares_of_their_sum() -> None:
    assert shares([1.0, 0.0, 3.0]) == [0.25, 0.0, 0.75]
    assert mean_weights([3.0, -1.0]) == [1.5, -0.5]
    assert shares([0.0, 0.0]) == [0.0, 0.0]


def test_negative_shares_are_refused_with_the_weights() -> None:
    with pytest.raises(WeightingError, match=r"takes the weights as shares.*1, -0.5"):
        shares([1.0, -0.5])
