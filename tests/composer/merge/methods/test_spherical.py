"""slerp, nuslerp and karcher against their formulas on dense vectors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors
from torch import Tensor

from loraweave.composer.merge.methods.karcher import karcher
from loraweave.composer.merge.methods.nuslerp import nuslerp
from loraweave.composer.merge.methods.slerp import slerp
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


@pytest.mark.parametrize("method", [slerp, nuslerp])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.02, 0.18)])
def test_it_is_the_formula_on_the_whole_update(method, weights: tuple[float, float]) -> None:
    found = method([FIRST, SECOND], weights)
    assert found.rank == 5
    assert close(found, arc(dense(FIRST), dense(SECOND), weights[1] / sum(weights)))


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_between_unit_updates_the_angle_goes_by_t_and_the_norm_stays(method) -> None:
    first, second = (scaled(f, 1 / float(dense(f).norm())) for f in (FIRST, SECOND))
    whole = math.acos(float((dense(first) * dense(second)).sum()))
    for t in (0.1, 0.5, 0.8):
        found = dense(method([first, second], [1 - t, t]))
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


@pytest.mark.parametrize("method", [slerp, nuslerp])
@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_on_one_line_it_is_the_straight_mean(method, factor: float) -> None:
    found = method([FIRST, scaled(FIRST, factor)], [0.25, 0.75])
    assert close(found, (0.25 + 0.75 * factor) * dense(FIRST))


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_exact_opposites_of_one_length_cancel_half_way(method) -> None:
    assert close(method([FIRST, scaled(FIRST, -1.0)], [1.0, 1.0]), torch.zeros(5, 7, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_with_a_zero_update_or_an_absent_layer_it_is_the_straight_mean(method) -> None:
    zero = Factors(torch.zeros(0, 7), torch.zeros(5, 0))
    for other in (zero, scaled(FIRST, 0.0), None):
        assert close(method([other, SECOND], [1.0, 3.0]), 0.75 * dense(SECOND))


def test_nearly_parallel_updates_are_interpolated_straight_by_slerp_alone() -> None:
    # an angle of 0.02, below the 0.0316 of a cosine of 0.9995, from which nuslerp's result differs by about 1e-5
    unit, other = dense(FIRST) / dense(FIRST).norm(), dense(SECOND)
    across = other - (unit * other).sum() * unit
    tilted_OI = (math.cos(0.02) * unit + math.sin(0.02) * across / across.norm()).float()
    tilted, straight = Factors(torch.eye(7), tilted_OI), scaled(FIRST, 1 / float(dense(FIRST).norm()))
    lengths = [float(dense(method([straight, tilted], [1.0, 1.0])).norm()) for method in (slerp, nuslerp)]
    assert lengths[0] == pytest.approx(math.cos(0.01), abs=1e-6)
    assert lengths[1] == pytest.approx(1.0, abs=1e-6)
    assert float(dense(slerp([straight, tilted], [1.0, 1.0], collinear=1.0)).norm()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_biases_take_the_coefficients_of_the_updates(method) -> None:
    first = Factors(FIRST.a_RI, FIRST.b_OR, bias_O=torch.ones(5))
    angle = math.acos(float((dense(FIRST) * dense(SECOND)).sum() / dense(FIRST).norm() / dense(SECOND).norm()))
    found = method([first, SECOND], [0.4, 0.6])
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
