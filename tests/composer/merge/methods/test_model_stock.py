"""model_stock against the paper's ratio on dense updates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import dense

from loraweave.composer.merge.methods.model_stock import model_stock
from loraweave.types import Factors


def related(count: int, common: float = 2.0) -> list[Factors]:
    """Updates that share a part, so that their cosines are well above zero."""
    shared = torch.randn(5, 7, generator=torch.Generator().manual_seed(99))
    made = []
    for seed in range(count):
        own = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        made.append(Factors(torch.eye(7), common * shared + own))
    return made


def expected(experts: list[Factors], angles: str) -> torch.Tensor:
    cosines = []
    for x, y in itertools.combinations([dense(f) for f in experts], 2):
        cosines.append(float((x * y).sum() / x.norm() / y.norm()))
    if angles == "mean_cosine":
        cosine = sum(cosines) / len(cosines)
    else:
        cosine = math.cos(sum(math.acos(c) for c in cosines) / len(cosines))
    num = len(experts)
    ratio = num * cosine / (1 + (num - 1) * cosine)
    return ratio * sum(dense(f) for f in experts) / num


@pytest.mark.parametrize("angles", ["mean_cosine", "mean_angle"])
@pytest.mark.parametrize("num", [2, 3, 5])
def test_it_is_the_papers_interpolation_between_base_and_mean(angles: str, num: int) -> None:
    experts = related(num)
    found = model_stock(experts, [1.0] * num, angles=angles)
    assert torch.allclose(dense(found), expected(experts, angles), rtol=1e-5, atol=1e-5)


def test_both_angles_differ_for_three_and_agree_for_two() -> None:
    def gap(count: int) -> float:
        experts = related(count)
        both = [dense(model_stock(experts, [1.0] * count, angles=a)) for a in ("mean_cosine", "mean_angle")]
        return float((both[0] - both[1]).norm())

    assert gap(2) < 1e-5 < gap(3)


def test_for_two_the_result_is_where_the_base_is_nearest_to_the_line_of_means() -> None:
    # the geometry of the paper's figure: with equal norms the merged update is the foot of a height in the triangle
    first, second = related(2)
    second = Factors(second.a_RI, second.b_OR * float(dense(first).norm() / dense(second).norm()))
    cosine = float((dense(first) * dense(second)).sum() / dense(first).norm() ** 2)
    found = dense(model_stock([first, second], [1.0, 1.0]))
    mean = (dense(first) + dense(second)) / 2
    assert float(found.norm() / mean.norm()) == pytest.approx(2 * cosine / (1 + cosine), rel=1e-5)


def test_copies_are_kept_whole() -> None:
    expert = related(1)[0]
    found = model_stock([expert] * 3, [1.0] * 3)
    assert torch.allclose(dense(found), dense(expert), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [2, 3])
def test_orthogonal_and_opposed_updates_give_the_base_model(num: int) -> None:
    orthogonal = [Factors(torch.eye(7)[place : place + 1], torch.ones(5, 1)) for place in range(num)]
    assert not dense(model_stock(orthogonal, [1.0] * num)).any()
    expert = related(1)[0]
    assert model_stock([expert, expert], [1.0, -1.0]).rank == 0


def test_one_expert_is_kept_with_its_weight_and_zero_updates_do_not_count() -> None:
    expert, zero = related(1)[0], Factors(torch.zeros(2, 7), torch.zeros(5, 2))
    for experts, weights in (([expert], [0.5]), ([expert, zero], [0.5, 1.0]), ([None, expert], [3.0, 0.5])):
        assert torch.allclose(dense(model_stock(experts, weights)), 0.5 * dense(expert), rtol=1e-6)


def test_a_weight_multiplies_the_update_first() -> None:
    first, second = related(2)
    twice = Factors(first.a_RI, 2.0 * first.b_OR)
    assert torch.allclose(dense(model_stock([first, second], [2.0, 1.0])), dense(model_stock([twice, second], [1.0, 1.0])))


def test_biases_take_the_coefficient_of_the_updates() -> None:
    first, second = related(2)
    with_bias = Factors(first.a_RI, first.b_OR, bias_O=torch.ones(5))
    ratio = float((dense(model_stock([first, second], [1.0, 1.0])) / (dense(first) + dense(second)))[0, 0])
    assert model_stock([with_bias, second], [1.0, 1.0]).bias_O.tolist() == pytest.approx([ratio] * 5, rel=1e-5)
