"""The search by slopes and a quadratic model: known optima, budgets, and losses that are not what the model foretold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize

from loraweave.errors import SearchFailed
from loraweave.extensions.routers.routers.first_order import LEAST_CURVATURE, FirstOrder, fit_quadratic


class Smooth:
    """A loss of w_E with its gradients by autograd, remembering every candidate."""

    def __init__(self, loss, spoil=()):
        self.loss = loss
        self.spoil = set(spoil)
        self.seen = []

    def __call__(self, candidates):
        return self.gradients(candidates)[0]

    def gradients(self, candidates):
        losses, gradients = [], []
        for candidate in candidates:
            values = candidate.values_BTLE.double().requires_grad_()
            loss = self.loss(values[0, 0].flatten())
            (gradient,) = torch.autograd.grad(loss, values)
            losses.append(math.nan if len(self.seen) in self.spoil else loss.item())
            gradients.append(gradient)
            self.seen.append(values[0, 0].detach().flatten())
        return losses, gradients


def names(count):
    return [f"expert {number}" for number in range(count)]


def quadratic(size, *, crossed):
    generator = torch.Generator().manual_seed(size)
    best_E = torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1
    half_EE = torch.randn(size, size, generator=generator, dtype=torch.float64)
    curved_EE = half_EE @ half_EE.T / size if crossed else torch.diag(torch.logspace(-1, 1.5, size).double())
    return (lambda w_E: (w_E - best_E) @ curved_EE @ (w_E - best_E)), best_E


@pytest.mark.parametrize("size", [2, 7, 31])
def test_a_quadratic_without_cross_terms_is_solved_in_a_few_candidates(size):
    loss, best_E = quadratic(size, crossed=False)
    result = FirstOrder(names(size), budget=20).solve(Smooth(loss))
    assert list(result.weights.values()) == pytest.approx(best_E.tolist(), abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_any_quadratic_is_solved_in_a_few_more_candidates_than_weights(size):
    loss, _ = quadratic(size, crossed=True)
    start = float(loss(torch.zeros(size, dtype=torch.float64)))
    result = FirstOrder(names(size), budget=2 * (size + 7)).solve(Smooth(loss))
    assert result.loss < 1e-6 * start


def test_of_a_linear_loss_every_weight_goes_to_its_edge():
    slope_E = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    result = FirstOrder(names(3), low=-0.5, high=1.0).solve(Smooth(lambda w_E: slope_E @ w_E))
    assert list(result.weights.values()) == pytest.approx([-0.5, 1.0, -0.5], abs=1e-6)


def test_the_first_step_follows_the_slopes_at_the_start_until_the_largest_has_gone_the_radius():
    smooth = Smooth(lambda w_E: torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64) @ w_E)
    FirstOrder(names(3), budget=4, radius=0.4).solve(smooth)
    assert smooth.seen[0].tolist() == [0, 0, 0]
    assert smooth.seen[1].tolist() == pytest.approx([-0.4, 0.2, 0.0], abs=1e-6)


def test_a_step_that_the_model_did_not_foretell_is_followed_by_shorter_ones_from_the_best():
    # falls at first, then steeply rises
    smooth = Smooth(lambda w_E: (-w_E + 50 * torch.relu(w_E - 0.05) ** 2).sum())
    result = FirstOrder(names(1), budget=30).solve(smooth)
    assert result.losses[1] > result.losses[0]
    assert result.weights["expert 0"] == pytest.approx(0.06, abs=1e-3)


def test_it_ends_before_its_budget_where_the_loss_is_flat():
    result = FirstOrder(names(3), budget=40).solve(Smooth(lambda w_E: (0 * w_E).sum() + 2.0))
    assert (result.evaluations, result.loss) == (2, 2.0)


@pytest.mark.parametrize("spoil", [{1}, {1, 2}, {2, 4}])
def test_after_a_candidate_without_a_score_shorter_steps_are_taken(spoil):
    loss, best_E = quadratic(3, crossed=False)
    result = FirstOrder(names(3), budget=40).solve(Smooth(loss, spoil))
    assert result.failed == len(spoil)
    assert list(result.weights.values()) == pytest.approx(best_E.tolist(), abs=1e-3)


def test_when_the_start_has_no_score_the_search_ends_by_name():
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        FirstOrder(names(2)).solve(Smooth(lambda w_E: w_E.sum(), spoil={0}))


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


@pytest.mark.parametrize(
    ("length", "fallen", "expected"),
    [
        # by quarters of the foretold fall, which is 4: less than one, between one and three, more than three
        (0.4, 0.9, 0.2),
        (0.4, -3.0, 0.2),
        (0.4, -math.inf, 0.1),
        (0.4, 1.0, 0.5),
        (0.5, 3.0, 0.5),
        (0.5, 3.1, 1.0),
        (0.4, 3.1, 0.5),
    ],
)
def test_what_is_trusted_shrinks_after_a_disappointment_and_grows_after_a_step_to_its_edge(length, fallen, expected):
    search = FirstOrder(["a"], radius=0.5)
    search._foretold = 4.0
    assert search._trust(length, fallen) == expected
