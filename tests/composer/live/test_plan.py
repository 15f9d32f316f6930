"""A layer's output is written to only where nothing else needs it as it was."""

import sys

import pytest
import torch
from tiny_models import random_adapter
from torch import nn

from loraweave import registry
from loraweave.composer.composer import Composer
from loraweave.routers.weights import MixtureWeights


@pytest.fixture
def engine():
    """Of one layer that is frozen, and adapters "a" and "b" of different ranks."""
    model = nn.Sequential(nn.Linear(7, 5)).double().requires_grad_(False)
    return Composer(model, [random_adapter(name, {"0": (rank, 7, 5)}, rank) for name, rank in (("a", 2), ("b", 3))])


def formula(engine, x, rows):
    """What the layer should give, row by row, with dense updates."""
    found = []
    for x_TI, row in zip(x, rows, strict=True):
        weight_OI = engine.model[0].weight
        for name, weight in row.items():
            factors = engine.pool[name].layers["0"]
            weight_OI = weight_OI + weight * factors.b_OR.double() @ factors.a_RI.double()
        found.append(nn.functional.linear(x_TI, weight_OI, engine.model[0].bias))
    return torch.stack(found)


ROWS = [{"a": 1.0}, {"b": -0.5, "a": 0.25}]


@pytest.mark.parametrize("rows", [[ROWS[0]] * 2, ROWS], ids=["one for all", "by row"])
def test_a_layer_is_the_formula_cold_warm_with_a_gradient_and_with_weights_by_token(rows, engine):
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    known = MixtureWeights.of(rows, engine.pool.names)
    by_token = MixtureWeights(known.values_BTLE.repeat(1, 3, 1, 1), known.experts)
    with engine.activate(rows):
        outputs = [engine.model(x), engine.model(x), engine.model(x.clone().requires_grad_())]
    with engine.activate(by_token):
        outputs.append(engine.model(x))
    for y in outputs:
        assert torch.allclose(y, formula(engine, x, rows), rtol=1e-12)


# rows of their own have the same with what extensions bring
BY_ROW = pytest.param(ROWS, marks=pytest.mark.skipif("gathered" not in registry.names("kernels"), reason="no such kernel"))


@pytest.mark.parametrize("mixture", [{"a": 1.0}, BY_ROW], ids=["one for all", "by row"])
def test_a_warm_layer_is_three_frames_of_ours_deep(mixture, engine):
    layer, x, depths = engine.model[0], torch.randn(2, 1, 7, dtype=torch.float64), []

    def count(frame, event, _):
        depth = 0
        while event == "call" and frame is not None:
            depth += "loraweave" in frame.f_globals["__name__"]
            frame = frame.f_back
        depths.append(depth)

    with engine.activate(mixture):
        layer(x)
        sys.setprofile(count)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    assert max(depths) == 3


@pytest.mark.parametrize("mixture", [{"a": 1.0}, ROWS], ids=["one for all", "by row"])
def test_an_output_that_a_forward_of_the_users_remembers_stays(mixture, engine):
    layer, x = engine.model[0], torch.randn(2, 3, 7, dtype=torch.float64)
    with engine.activate(mixture):
        wanted = layer(x)
    own, known = layer.forward, {}

    def remembering(x):
        if x not in known:
            known[x] = own(x)
        return known[x]

    # after the engine has looked at the layer, and has mixed it once
    layer.forward = remembering
    base = layer(x).clone()
    with engine.activate(mixture):
        assert torch.allclose(layer(x), wanted, rtol=1e-12)
        assert torch.allclose(layer(x), wanted, rtol=1e-12)
    assert torch.equal(layer(x), base)


# torch itself uses what it warns of
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rows", [[ROWS[0]] * 2, ROWS], ids=["one for all", "by row"])
def test_forward_mode_derivatives_go_through_what_is_written_to(rows, engine):
    x, direction = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    wanted = torch.func.jvp(lambda x: formula(engine, x, rows), (x,), (direction,))
    with engine.activate(rows):
        for _ in range(2):
            found = torch.func.jvp(engine.model, (x,), (direction,))
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [[ROWS[0]] * 2, ROWS], ids=["one for all", "by row"])
def test_gradients_of_gradients_are_the_formulas(rows, engine):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    found = []
    with engine.activate(rows):
        for call in (engine.model, lambda x: formula(engine, x, rows)):
            (first,) = torch.autograd.grad(call(x).tanh().square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.allclose(found[0], found[1], rtol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("rows", [[ROWS[0]] * 2, ROWS], ids=["one for all", "by row"])
def test_batches_of_batches_are_mixed_one_by_one(rows, engine):
    x = torch.randn(4, 2, 3, 7, dtype=torch.float64)
    with engine.activate(rows):
        for _ in range(2):
            found = torch.vmap(engine.model)(x)
    assert torch.allclose(found, torch.stack([formula(engine, each, rows) for each in x]), rtol=1e-10)


def test_a_gradient_outlives_the_mixture_whose_memory_others_want(engine):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    with engine.activate(ROWS):
        y = engine.model(x)
    for number in range(9):
        # as many elements, so that they would take the same memory
        with engine.activate([{"a": number + 2.0}, {"b": 0.5, "a": number + 2.0}]):
            engine.model(x)
    y.square().sum().backward()
    (wanted,) = torch.autograd.grad(formula(engine, x, ROWS).square().sum(), x)
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted, rtol=1e-10)
