"""The quadratic model: its formula solved another way, what it must interpolate, and its lowest points."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear, minimize

from loraweave.routers.searches.first_order import LEAST_CURVATURE, fit_quadratic


def steps_and_changes(num_points, size, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num_points, size)), generator.normal(size=(num_points, size)) + 0.7


def dense(model):
    return np.stack([model.hessian_times(column) for column in np.eye(len(model.centre))], axis=1)


@pytest.mark.parametrize(("num_points", "size"), [(1, 1), (1, 5), (3, 5), (7, 4)])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_the_curvature_minimises_what_the_page_says(num_points, size, ridge):
    s_KD, y_KD = steps_and_changes(num_points, size)
    found = dense(fit_quadratic(np.zeros(size), np.ones(size), s_KD, y_KD, curvature=2.0, ridge=ridge))
    squares_K = (s_KD**2).sum(axis=1)
    along_K = (s_KD * y_KD).sum(axis=1) / squares_K
    mean = along_K[along_K > 0].mean() if (along_K > 0).any() else 2.0
    above = (s_KD * y_KD / squares_K[:, None]).sum(axis=0) + ridge * mean / size
    below = (s_KD**2 / squares_K[:, None]).sum(axis=0) + ridge / size
    diagonal = np.maximum(above / below, LEAST_CURVATURE * mean)

    def misfit(upper):
        rest = np.zeros((size, size))
        rest[np.triu_indices(size)] = upper
        rest = rest + rest.T
        left_KD = s_KD @ rest - (y_KD - diagonal * s_KD)
        return ((left_KD**2).sum(axis=1) / squares_K).sum() + ridge * (rest**2).sum()

    written = minimize(misfit, np.zeros(size * (size + 1) // 2), method="BFGS", options={"gtol": 1e-9})
    rest = found - np.diag(diagonal)
    ours = rest[np.triu_indices(size)] - np.diag(np.diag(rest))[np.triu_indices(size)] / 2
    assert misfit(ours) == pytest.approx(written.fun, rel=1e-6, abs=1e-9)
    assert found == pytest.approx(found.T, abs=1e-9)


def test_without_points_the_curvature_is_the_same_in_all_directions():
    model = fit_quadratic(np.zeros(3), np.ones(3), np.empty((0, 3)), np.empty((0, 3)), curvature=2.0, ridge=1e-4)
    assert dense(model) == pytest.approx(2 * np.eye(3))


def test_with_as_many_points_as_weights_a_quadratic_is_known_exactly():
    generator = np.random.default_rng(3)
    half = generator.normal(size=(5, 5))
    hessian = half @ half.T
    s_KD = generator.normal(size=(5, 5))
    model = fit_quadratic(np.zeros(5), np.ones(5), s_KD, s_KD @ hessian, curvature=1.0, ridge=1e-13)
    assert dense(model) == pytest.approx(hessian, abs=1e-6)


def test_the_lowest_point_of_a_box_is_that_of_bounded_least_squares():
    generator = np.random.default_rng(4)
    half, goal = generator.normal(size=(6, 4)), generator.normal(size=6)
    low, high = np.full(4, -0.2), np.full(4, 0.3)
    centre = np.array([0.1, -0.1, 0.0, 0.3])
    slope, s_KD = half.T @ (half @ centre - goal), generator.normal(size=(4, 4))
    model = fit_quadratic(centre, slope, s_KD, s_KD @ (half.T @ half), curvature=1.0, ridge=1e-13)
    assert model.lowest(low, high) == pytest.approx(lsq_linear(half, goal, (low, high)).x, abs=1e-6)


def test_where_the_model_curves_downwards_its_lowest_point_is_on_the_edge():
    model = fit_quadratic(np.zeros(1), np.array([-0.1]), np.ones((1, 1)), np.full((1, 1), -2.0), curvature=1.0, ridge=1e-9)
    assert model.lowest(np.array([-1.0]), np.array([1.5])).tolist() == [1.5]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_lowest_point_does_not_depend_on_the_units_of_the_loss(scale):
    s_KD, y_KD = np.eye(2), np.array([[3.0, 0.0], [0.0, 5.0]]) * scale
    model = fit_quadratic(np.zeros(2), np.array([-3.0, 10.0]) * scale, s_KD, y_KD, curvature=scale, ridge=1e-9)
    assert model.lowest(np.full(2, -9.0), np.full(2, 9.0)) == pytest.approx([1.0, -2.0], rel=1e-5)
