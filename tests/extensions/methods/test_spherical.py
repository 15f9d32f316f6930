"""nuslerp, karcher and model_stock against their formulas on dense vectors in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors
from torch import Tensor

from loraweave.extensions.methods.methods.karcher import karcher
from loraweave.extensions.methods.methods.model_stock import model_stock
from loraweave.extensions.methods.methods.nuslerp import nuslerp
from loraweave.extensions.methods.methods.slerp import slerp
from loraweave.types import Factors


def scaled(update: Factors, weight: float) -> Factors:
    return Factors(update.a_RI, update.b_OR * weight)


def arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Rotates the first unit vector in the plane of both by t of the angle, with lengths taken along the formula."""
    angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def close(found: Factors, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(dense(found), expected, rtol=10 * tolerance, atol=tolerance)


FIRST, SECOND = factors(0, 2), factors(1, 3)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.02, 0.18)])
def test_it_is_the_formula_on_the_whole_update(weights: tuple[float, float]) -> None:
    found = nuslerp([FIRST, SECOND], weights)
    assert found.rank == 5
    assert close(found, arc(dense(FIRST), dense(SECOND), weights[1] / sum(weights)))


def test_between_unit_updates_the_angle_goes_by_t_and_the_norm_stays() -> None:
    first, second = (scaled(f, 1 / float(dense(f).norm())) for f in (FIRST, SECOND))
    whole = math.acos(float((dense(first) * dense(second)).sum()))
    for t in (0.1, 0.5, 0.8):
        found = dense(nuslerp([first, second], [1 - t, t]))
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)
        assert math.acos(float((found * dense(first)).sum())) == pytest.approx(t * whole, abs=1e-5)


def test_row_by_row_every_output_has_its_own_angle() -> None:
    found = nuslerp([FIRST, SECOND], [0.3, 0.7], row_wise=True)
    expected = torch.stack([arc(x, y, 0.7) for x, y in zip(dense(FIRST), dense(SECOND), strict=True)])
    assert found.rank == 5
    assert close(found, expected)


def test_row_by_row_zero_and_parallel_rows_are_interpolated_straight() -> None:
    b_OR = SECOND.b_OR.clone()
    b_OR[0] = 0.0
    second = Factors(SECOND.a_RI, b_OR, bias_O=torch.ones(5))
    first = Factors(SECOND.a_RI, torch.cat([SECOND.b_OR[:1], 2.0 * b_OR[1:2], FIRST.b_OR.new_ones(3, 3)]))
    found = nuslerp([first, second], [0.25, 0.75], row_wise=True)
    for row in (0, 1):
        assert torch.allclose(dense(found)[row], (0.25 * dense(first) + 0.75 * dense(second))[row], atol=1e-5)
        assert float(found.bias_O[row]) == pytest.approx(0.75)
    assert torch.allclose(dense(found)[3], arc(dense(first)[3], dense(second)[3], 0.75), atol=1e-5)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_on_one_line_it_is_the_straight_mean(factor: float) -> None:
    found = nuslerp([FIRST, scaled(FIRST, factor)], [0.25, 0.75])
    assert close(found, (0.25 + 0.75 * factor) * dense(FIRST))


def test_exact_opposites_of_one_length_cancel_half_way() -> None:
    assert close(nuslerp([FIRST, scaled(FIRST, -1.0)], [1.0, 1.0]), torch.zeros(5, 7, dtype=torch.float64), 1e-5)


def test_with_a_zero_update_or_an_absent_layer_it_is_the_straight_mean() -> None:
    zero = Factors(torch.zeros(0, 7), torch.zeros(5, 0))
    for other in (zero, scaled(FIRST, 0.0), None):
        assert close(nuslerp([other, SECOND], [1.0, 3.0]), 0.75 * dense(SECOND))


def test_nearly_parallel_updates_are_turned_too() -> None:
    # an angle of 0.02, below the 0.0316 of a cosine of 0.9995, which slerp interpolates straight
    unit, other = dense(FIRST) / dense(FIRST).norm(), dense(SECOND)
    across = other - (unit * other).sum() * unit
    tilted_OI = (math.cos(0.02) * unit + math.sin(0.02) * across / across.norm()).float()
    tilted, straight = Factors(torch.eye(7), tilted_OI), scaled(FIRST, 1 / float(dense(FIRST).norm()))
    assert float(dense(nuslerp([straight, tilted], [1.0, 1.0])).norm()) == pytest.approx(1.0, abs=1e-6)


def test_biases_take_the_coefficients_of_the_updates() -> None:
    first = Factors(FIRST.a_RI, FIRST.b_OR, bias_O=torch.ones(5))
    angle = math.acos(float((dense(FIRST) * dense(SECOND)).sum() / dense(FIRST).norm() / dense(SECOND).norm()))
    found = nuslerp([first, SECOND], [0.4, 0.6])
    assert found.bias_O.tolist() == pytest.approx([math.sin(0.4 * angle) / math.sin(angle)] * 5, rel=1e-5)


def centre(vectors: list[Tensor], parts: list[float]) -> Tensor:
    """The Karcher mean of unit vectors on dense vectors, by the definition: gradient steps with exp and log maps."""
    mean = sum(p * v for p, v in zip(parts, vectors, strict=True))
    mean = mean / mean.norm()
    for _ in range(500):
        step = torch.zeros_like(mean)
        for part, vector in zip(parts, vectors, strict=True):
            cosine = float((mean * vector).sum())
            across = vector - cosine * mean
            if float(across.norm()) > 1e-14:
                step += part * math.acos(max(min(cosine, 1.0), -1.0)) * across / across.norm()
        length = float(step.norm())
        if length < 1e-14:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean = mean / mean.norm()
    return mean


KARCHER = [factors(0, 2), factors(1, 3), factors(2, 1), factors(3, 2)]


def test_karcher_is_the_centre_of_the_directions_times_the_mean_norm() -> None:
    parts = [0.1, 0.2, 0.3, 0.4]
    norms = [float(dense(f).norm()) for f in KARCHER]
    units = [dense(f) / norm for f, norm in zip(KARCHER, norms, strict=True)]
    expected = sum(p * n for p, n in zip(parts, norms, strict=True)) * centre(units, parts)
    found = karcher(KARCHER, [1.0, 2.0, 3.0, 4.0])
    assert found.rank == 8
    assert close(found, expected, 1e-5)


def test_at_the_centre_the_pulls_of_all_directions_cancel() -> None:
    mean = dense(karcher(KARCHER, [1.0, 1.0, 1.0, 1.0]))
    mean = mean / mean.norm()
    pull = torch.zeros_like(mean)
    for f in KARCHER:
        unit = dense(f) / dense(f).norm()
        cosine = float((mean * unit).sum())
        across = unit - cosine * mean
        pull += math.acos(cosine) * across / across.norm()
    assert float(pull.norm()) < 1e-5


def test_karcher_of_two_is_slerp_of_their_directions() -> None:
    units = [scaled(f, 1 / float(dense(f).norm())) for f in (FIRST, SECOND)]
    assert close(karcher(units, [0.3, 0.7]), dense(slerp(units, [0.3, 0.7])), 1e-5)


def test_karcher_of_copies_is_their_direction_and_the_mean_norm() -> None:
    assert close(karcher([FIRST, scaled(FIRST, 3.0)], [1.0, 1.0]), 2.0 * dense(FIRST), 1e-5)


def test_zero_updates_bring_karcher_their_share_of_no_norm() -> None:
    zero = Factors(torch.zeros(1, 7), torch.zeros(5, 1))
    assert close(karcher([FIRST, zero], [1.0, 3.0]), 0.25 * dense(FIRST))
    whole, half = karcher([FIRST, SECOND], [1.0, 1.0]), karcher([FIRST, SECOND, zero, None], [1.0] * 4)
    assert close(half, dense(whole) / 2)


def test_opposites_have_no_centre_and_give_the_mean_of_the_updates() -> None:
    assert close(karcher([FIRST, scaled(FIRST, -3.0)], [1.0, 1.0]), -dense(FIRST), 1e-5)


def related(count: int, common: float = 2.0) -> list[Factors]:
    """Updates that share a part, so that their cosines are well above zero."""
    shared = torch.randn(5, 7, generator=torch.Generator().manual_seed(99))
    made = []
    for seed in range(count):
        own = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        made.append(Factors(torch.eye(7), common * shared + own))
    return made


def interpolated(experts: list[Factors], angles: str) -> torch.Tensor:
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
    assert torch.allclose(dense(found), interpolated(experts, angles), rtol=1e-5, atol=1e-5)


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
