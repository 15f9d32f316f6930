"""The search by slopes and a quadratic model: known optima, budgets, and losses that are not what the model foretold."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.errors import SearchFailed
from loraweave.routers.searches.first_order import FirstOrder


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
