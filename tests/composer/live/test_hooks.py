"""A hook serves a mixture by row and what torch.compile traces; without one, the core's plain ways do."""

import pytest
import torch
from tiny_models import random_adapter
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from loraweave.composer.composer import Composer
from loraweave.composer.live import plan
from loraweave.composer.live.hook import LiveHook
from loraweave.composer.live.kernels._parts import AddsInPlace

SHAPES = {"0": (2, 9, 5), "1": (3, 5, 4)}
ROWS = [{"a": 0.5}, {"b": -2.0}]


@pytest.fixture
def engine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 4)).double().requires_grad_(False)
    return lambda: Composer(model, [random_adapter(name, SHAPES) for name in "ab"])


def by_formula(engine, x_BTI):
    """y = W x + bias + w_e b_e (a_e x), layer after layer, each row with its own expert."""
    for name, module in engine.model.named_children():
        rows = []
        for row, x_TI in zip(ROWS, x_BTI, strict=True):
            ((expert, weight),) = row.items()
            factors = engine.pool[expert].layers[name]
            update_TO = x_TI @ factors.a_RI.double().T @ factors.b_OR.double().T
            rows.append(x_TI @ module.weight.T + module.bias + weight * update_TO)
        x_BTI = torch.stack(rows)
    return x_BTI


class Constant(AddsInPlace):
    """A kernel that adds a number to each output."""

    dtype = torch.float64
    num_bytes = 0

    def __init__(self, number):
        self.number = number

    def update(self, x_BTI):
        return x_BTI.new_full((*x_BTI.shape[:2], 5), self.number)

    def add_(self, x_BTI, y_BTO):
        y_BTO += self.number


class Told(LiveHook):
    """A hook for layer "0" alone, which notes what it is asked for."""

    said: list
    devices = ("cpu",)

    def prepare(self, mixture, lease, layers):
        self.said.append(("prepare", mixture.experts, tuple(layers)))
        return self

    @property
    def remembered(self):
        return {}

    def reaches(self, layer):
        return layer == "0"

    def kernel(self, prepared, layer, device, dtype, *, one):
        self.said.append((layer.name, one))
        return Constant(3.0)

    def release(self, prepared):
        self.said.append("release")

    def forget(self, expert):
        self.said.append(("forget", expert))


def test_what_a_hook_prepares_stands_in_for_the_kernels_until_the_last_activation_ends(engine, monkeypatch):
    monkeypatch.setattr(Told, "said", [], raising=False)
    monkeypatch.setattr(plan, "hook_kinds", lambda: (Told,))
    engine = engine()
    x_BTI = torch.randn(2, 1, 9, dtype=torch.float64)
    with torch.no_grad():
        with engine.activate(ROWS), engine.activate(ROWS):
            hooked = engine.model(x_BTI)
            engine.model(torch.ones(2, 3, 9, dtype=torch.float64))
        first, second = engine.model
        assert torch.equal(hooked, second(first(x_BTI) + 3.0))
    assert Told.said == [("prepare", ("a", "b"), ("0", "1")), ("0", True), ("0", False), "release"]
    engine.unload("b")
    assert Told.said[-1] == ("forget", "b")


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_hook_a_mixture_is_the_formula_also_of_a_model_that_torch_compiles(engine, monkeypatch):
    monkeypatch.setattr(plan, "hook_kinds", tuple)
    engine = engine()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(engine.model, backend=counter)
    x_BTI = torch.randn(2, 3, 9, dtype=torch.float64)
    for learns in (False, True):
        base = compiled(x_BTI)
        with torch.set_grad_enabled(learns), engine.activate(ROWS):
            for _ in range(2):
                assert torch.allclose(compiled(x_BTI), by_formula(engine, x_BTI), rtol=1e-12, atol=1e-12)
        assert torch.equal(compiled(x_BTI), base)
    assert counter.frame_count > 1
