"""Parameters and the weights they stand for: derivatives, inverses and bounds; and Adam's steps, which are torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.errors import WeightingError
from loraweave.routers.searches._space import Space
from loraweave.routers.searches.gradient import Adam, Free, Softmax, SoftmaxBias

SPACE = Space(("a", "b", "c"), groups={"early": ("l0", "l1"), "late": ("l2",)})
FORMULAS = {
    Free: lambda p: p,
    Softmax: lambda p: torch.softmax(p.view(2, 3), dim=1).flatten(),
    SoftmaxBias: lambda p: torch.softmax(p[:6].view(2, 3), dim=1).flatten() + p[6:],
}


@pytest.mark.parametrize("form", FORMULAS)
def test_weights_and_their_derivative_are_those_of_the_formula_by_autograd(form):
    written = form(SPACE)
    parameters = np.random.default_rng(1).normal(size=written.size) * 3
    pull = np.random.default_rng(2).normal(size=6)
    p = torch.tensor(parameters, requires_grad=True)
    w = FORMULAS[form](p)
    w.backward(torch.from_numpy(pull))
    assert written.vector(parameters) == pytest.approx(w.detach().numpy(), abs=1e-12)
    assert written.pull(parameters, pull) == pytest.approx(p.grad.numpy(), abs=1e-12)


@pytest.mark.parametrize("form", FORMULAS)
def test_the_parameters_of_a_vector_give_it_back(form):
    vector = np.array([0.2, 0.3, 0.5, 0.05, 0.9, 0.05])
    written = form(SPACE)
    assert written.vector(written.parameters(vector)) == pytest.approx(vector, abs=1e-12)


@pytest.mark.parametrize("form", [Free, SoftmaxBias])
def test_weights_outside_the_box_are_brought_to_its_edge_and_others_kept(form):
    written = form(SPACE)
    vector = np.array([-1.6, 1.7, 0.2, 0.0, 1.5, -7.0])
    inside = written.inside(written.parameters(vector))
    assert written.vector(inside) == pytest.approx([-1.5, 1.5, 0.2, 0.0, 1.5, -1.5], abs=1e-12)


def test_large_logits_give_no_overflow():
    assert Softmax(Space(("a", "b"))).vector(np.array([1e4, -1e4])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("vector", "shares"),
    [
        ([1.0, 0.0, 0.0], [1 / (1 + 2 / 30), (1 / 30) / (1 + 2 / 30), (1 / 30) / (1 + 2 / 30)]),
        ([1.2, 0.4, -0.9], [0.75 / (1 + 1 / 30), 0.25 / (1 + 1 / 30), (1 / 30) / (1 + 1 / 30)]),
        ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
        ([-1.0, -2.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_a_softmax_begins_at_the_shares_of_positive_weights_with_a_tenth_of_an_even_one_at_least(vector, shares):
    written = Softmax(Space(("a", "b", "c")))
    assert written.vector(written.parameters(np.array(vector))) == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (-1.0, 0.9)])
def test_a_box_that_a_softmax_would_leave_is_refused(low, high):
    with pytest.raises(WeightingError, match=f"the bounds are \\[{low}, {high}\\]"):
        Softmax(Space(("a", "b"), low, high))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.8, 0.0)])
def test_the_steps_are_those_of_torch(betas):
    gradients = np.random.default_rng(0).normal(size=(7, 5)) * np.logspace(-6, 3, 5)
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.03, betas=betas)
    ours, place = Adam(5, betas), np.zeros(5)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
        place = place + ours.step(gradient, 0.03)
        assert place == pytest.approx(parameter.detach().numpy(), rel=1e-9, abs=1e-12)
