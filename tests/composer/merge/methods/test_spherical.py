"""slerp against its formula on dense vectors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors
from torch import Tensor

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
    found = slerp([FIRST, SECOND], weights)
    assert found.rank == 5
    assert close(found, arc(dense(FIRST), dense(SECOND), weights[1] / sum(weights)))


def test_between_unit_updates_the_angle_goes_by_t_and_the_norm_stays() -> None:
    first, second = (scaled(f, 1 / float(dense(f).norm())) for f in (FIRST, SECOND))
    whole = math.acos(float((dense(first) * dense(second)).sum()))
    for t in (0.1, 0.5, 0.8):
        found = dense(slerp([first, second], [1 - t, t]))
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)
        assert math.acos(float((found * dense(first)).sum())) == pytest.approx(t * whole, abs=1e-5)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_on_one_line_it_is_the_straight_mean(factor: float) -> None:
    found = slerp([FIRST, scaled(FIRST, factor)], [0.25, 0.75])
    assert close(found, (0.25 + 0.75 * factor) * dense(FIRST))


def test_exact_opposites_of_one_length_cancel_half_way() -> None:
    assert close(slerp([FIRST, scaled(FIRST, -1.0)], [1.0, 1.0]), torch.zeros(5, 7, dtype=torch.float64), 1e-5)


def test_with_a_zero_update_or_an_absent_layer_it_is_the_straight_mean() -> None:
    zero = Factors(torch.zeros(0, 7), torch.zeros(5, 0))
    for other in (zero, scaled(FIRST, 0.0), None):
        assert close(slerp([other, SECOND], [1.0, 3.0]), 0.75 * dense(SECOND))


def test_nearly_parallel_updates_are_interpolated_straight() -> None:
    # an angle of 0.02, below the 0.0316 of a cosine of 0.9995, where the arc is longer than the chord by about 1e-5
    unit, other = dense(FIRST) / dense(FIRST).norm(), dense(SECOND)
    across = other - (unit * other).sum() * unit
    tilted_OI = (math.cos(0.02) * unit + math.sin(0.02) * across / across.norm()).float()
    tilted, straight = Factors(torch.eye(7), tilted_OI), scaled(FIRST, 1 / float(dense(FIRST).norm()))
    assert float(dense(slerp([straight, tilted], [1.0, 1.0])).norm()) == pytest.approx(math.cos(0.01), abs=1e-6)
    assert float(dense(slerp([straight, tilted], [1.0, 1.0], collinear=1.0)).norm()) == pytest.approx(1.0, abs=1e-6)


def test_biases_take_the_coefficients_of_the_updates() -> None:
    first = Factors(FIRST.a_RI, FIRST.b_OR, bias_O=torch.ones(5))
    angle = math.acos(float((dense(FIRST) * dense(SECOND)).sum() / dense(FIRST).norm() / dense(SECOND).norm()))
    found = slerp([first, SECOND], [0.4, 0.6])
    assert found.bias_O.tolist() == pytest.approx([math.sin(0.4 * angle) / math.sin(angle)] * 5, rel=1e-5)
