"""Gradient descent on weights, against the published forms written out with torch's own Adam."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.searches._space import Space
from loraweave.routers.searches.gradient import Adam, Free, Gradient, Softmax, SoftmaxBias
from loraweave.routers.weights import MixtureWeights

NAMES = ("a", "b/c", "🦙")
LAYERS = ("l0", "l1")


class Valley:
    """(w - best)^T H (w - best), summed over layers, with gradients, remembering every candidate."""

    def __init__(self, best=(0.9, -0.4, 0.2), spoil=()):
        self.best_E = torch.tensor(best, dtype=torch.float64)
        self.curved_EE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
        self.spoil = set(spoil)
        self.seen = []

    def loss(self, values_LE):
        away_LE = values_LE.double() - self.best_E
        return ((away_LE @ self.curved_EE) * away_LE).sum()

    def __call__(self, candidates):
        return self.gradients(candidates)[0]

    def gradients(self, candidates):
        losses, gradients = [], []
        for candidate in candidates:
            values = candidate.values_BTLE.clone().requires_grad_()
            loss = self.loss(values[0, 0])
            loss.backward()
            losses.append(math.nan if len(self.seen) in self.spoil else float(loss.detach()))
            gradients.append(values.grad)
            self.seen.append(candidate.values_BTLE[0, 0])
        return losses, gradients


def softmax(p):
    return torch.softmax(p, dim=-1)


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_softmax_is_asadis_update_from_zero_logits_by_adam(layers):
    valley = Valley()
    Gradient(NAMES, budget=12, layers=layers, form="softmax", lr=0.1, schedule="constant").solve(valley)
    p_LE = torch.zeros(2 if layers else 1, 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([p_LE], lr=0.1)
    for seen_LE in valley.seen:
        assert torch.allclose(seen_LE.double(), softmax(p_LE), atol=1e-6)
        adam.zero_grad()
        valley.loss(softmax(p_LE)).backward()
        adam.step()
    assert len(valley.seen) == 6


def test_softmax_begins_at_the_uniform_mixture():
    mixture = Gradient(NAMES, form="softmax", layers=LAYERS).ask()[0]
    assert torch.allclose(mixture.values_BTLE, torch.full((1, 1, 2, 3), 1 / 3), atol=1e-6)


def test_free_weights_are_cats_one_for_each_adapter_and_layer_by_adam():
    valley = Valley()
    Gradient(NAMES, budget=12, layers=LAYERS, form="free", lr=0.1, schedule="constant", betas=(0.5, 0.9)).solve(valley)
    w_LE = torch.full((2, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w_LE], lr=0.1, betas=(0.5, 0.9))
    for seen_LE in valley.seen:
        assert torch.allclose(seen_LE.double(), w_LE, atol=1e-6)
        adam.zero_grad()
        valley.loss(w_LE).backward()
        adam.step()


def test_softmax_bias_is_loraflows_limit_for_a_whole_task_by_adam():
    valley = Valley()
    Gradient(NAMES, budget=16, form="softmax_bias", lr=0.1, schedule="constant").solve(valley)
    p_E = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    b_E = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([p_E, b_E], lr=0.1)
    for seen_LE in valley.seen:
        w_E = softmax(p_E) + b_E
        assert torch.allclose(seen_LE[0].double(), w_E, atol=1e-6)
        adam.zero_grad()
        valley.loss(w_E[None]).backward()
        adam.step()
    assert not math.isclose(float(valley.seen[-1].sum()), 1.0, abs_tol=0.05)


@pytest.mark.parametrize(
    ("form", "layers", "count"),
    [
        ("softmax", None, 3),
        ("softmax", LAYERS, 6),
        ("free", LAYERS, 6),
        ("softmax_bias", None, 6),
        ("softmax_bias", LAYERS, 6),
    ],
)
def test_the_number_of_trained_scalars_is_in_the_result(form, layers, count):
    assert Gradient(NAMES, budget=2, form=form, layers=layers).solve(Valley()).num_trained == count


def test_the_step_is_half_at_first_and_then_goes_down_half_a_cosine_to_zero():
    valley = Valley()
    Gradient(NAMES, budget=24, form="free", lr=0.1, betas=(0.0, 0.0)).solve(valley)
    # without memory Adam moves each weight by the step, up or down
    moved = torch.stack(valley.seen).double().diff(dim=0).abs().amax(dim=(1, 2))
    expected = [0.05, 0.05, *(0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(1, 10))]
    assert moved.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["free", "softmax_bias"])
def test_with_enough_steps_the_optimum_is_found(form):
    result = Gradient(NAMES, budget=800, form=form, schedule="constant").solve(Valley())
    assert list(result.weights.values()) == pytest.approx([0.9, -0.4, 0.2], abs=0.01)


def test_softmax_finds_the_best_mixture_of_the_simplex():
    result = Gradient(NAMES, budget=800, form="softmax").solve(Valley(best=(0.6, 0.3, 0.1)))
    assert list(result.weights.values()) == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


def test_no_weight_leaves_the_box():
    valley = Valley()
    result = Gradient(NAMES, budget=200, form="free", low=-0.1, high=0.6).solve(valley)
    seen = torch.stack(valley.seen)
    assert seen.min() >= np.float32(-0.1)
    assert seen.max() <= np.float32(0.6)
    assert result.weights["a"] == pytest.approx(0.6)


def test_the_best_candidate_is_returned_not_the_last():
    result = Gradient(NAMES, budget=100, form="free", lr=0.4).solve(Valley())
    assert result.loss == min(result.losses) < result.losses[-1]


def test_patience_ends_it_after_so_many_steps_without_a_lower_loss():
    valley = Valley()
    start = dict(zip(NAMES, valley.best_E.tolist(), strict=True))
    result = Gradient(NAMES, budget=400, form="free", start=start, patience=3).solve(valley)
    assert len(result.losses) == 4
    assert result.weights == pytest.approx(start)


def test_after_a_candidate_without_a_score_half_the_step_is_tried_from_the_best():
    valley = Valley(spoil={3})
    Gradient(NAMES, budget=10, form="free", lr=0.1, schedule="constant", betas=(0.0, 0.0)).solve(valley)
    # without memory Adam moves each weight by lr, up or down
    best, failed, again = (valley.seen[number][0].double() for number in (2, 3, 4))
    assert (failed - best).abs().tolist() == pytest.approx([0.1] * 3, abs=1e-6)
    assert (again - best).tolist() == pytest.approx(((failed - best) / 2).tolist(), abs=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_is_not_finite_counts_as_a_failure(where):
    class Sometimes(Valley):
        def gradients(self, candidates):
            (loss,), (gradient,) = super().gradients(candidates)
            if len(self.seen) % 3 == 0:
                loss, gradient = (math.nan, gradient) if where == "loss" else (loss, gradient * math.inf)
            return [loss], [gradient]

    result = Gradient(NAMES, budget=60, form="free").solve(Sometimes())
    assert result.failed == 10
    assert result.loss < float(Valley().loss(torch.full((1, 3), 1 / 3)))


def test_when_the_start_has_no_score_the_search_ends_by_name():
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        Gradient(NAMES).solve(Valley(spoil={0}))


@pytest.mark.parametrize("form", ["softmax", "free", "softmax_bias"])
@pytest.mark.parametrize("spoil", [(), (4,)])
def test_resumed_from_its_checkpoint_it_takes_the_same_steps_bit_for_bit(form, spoil, tmp_path):
    whole = Valley(spoil=spoil)
    Gradient(NAMES, budget=40, form=form, layers=LAYERS).solve(whole)

    class Killed(Valley):
        def gradients(self, candidates):
            if len(self.seen) == 7:
                raise KeyboardInterrupt
            return super().gradients(candidates)

    killed, rest = Killed(spoil=spoil), Valley(spoil=[number - 7 for number in spoil])
    log = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        Gradient(NAMES, budget=40, form=form, layers=LAYERS).solve(killed, checkpoint=log)
    Gradient(NAMES, budget=40, form=form, layers=LAYERS).solve(rest, checkpoint=log)
    assert torch.equal(torch.stack(whole.seen), torch.stack(killed.seen + rest.seen))


def test_it_can_start_at_weights_by_layer():
    start = MixtureWeights(torch.tensor([[[[0.1, 0.2, 0.3], [0.4, -0.5, 0.6]]]]), NAMES, LAYERS)
    mixture = Gradient(NAMES, form="free", layers=LAYERS, start=start).ask()[0]
    assert torch.equal(mixture.values_BTLE, start.values_BTLE)


@pytest.mark.parametrize("form", ["softmax", "free", "softmax_bias"])
def test_weights_are_by_layer_or_shared_as_the_caller_says(form):
    shared = Gradient(NAMES, form=form, layers=LAYERS, by_layer=False).ask()[0]
    apart = Gradient(NAMES, form=form, layers=LAYERS, by_layer=True).ask()[0]
    assert (shared.layers, apart.layers) == ((), LAYERS)


def test_groups_of_layers_share_their_weights():
    valley = Valley(best=((0.9, -0.4, 0.2), (0.9, 0.2, -0.4), (0.2, 0.1, 0.9)))
    result = Gradient(NAMES, budget=10, layers=[*LAYERS, "l2"], groups={"early": LAYERS, "late": ["l2"]}).solve(valley)
    values_LE = result.mixture.values_BTLE[0, 0]
    assert torch.equal(values_LE[0], values_LE[1])
    assert not torch.equal(values_LE[0], values_LE[2])


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
