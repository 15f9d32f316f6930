"""Routers whose scores come with the experts' own product give what they give alone."""

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer

NUM_INPUTS, NUM_OUTPUTS = 63, 37


class Squared:
    """A router that is none of loraweave's: two directions for three experts."""

    def __init__(self, *, learned=False):
        self.v_PI = torch.randn(2, NUM_INPUTS, generator=torch.Generator().manual_seed(5)).requires_grad_(learned)
        self.calls = []

    def directions(self, layer):
        return self.v_PI

    def weights_along(self, z_BTP, x_BTI, layer):
        self.calls.append("along")
        return self._of(z_BTP)

    def weights(self, x_BTI, layer):
        self.calls.append("alone")
        return self._of(x_BTI.to(self.v_PI.dtype) @ self.v_PI.T)

    def _of(self, z_BTP):
        return torch.cat([z_BTP.square(), z_BTP.sum(dim=-1, keepdim=True)], dim=-1)


@pytest.fixture
def engine(make_adapter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_OUTPUTS)).requires_grad_(False)
    return Composer(
        model, [make_adapter(model, name, rank=rank, targets=("0",)) for rank, name in enumerate("abc", start=1)]
    )


def expected(engine, router, x_BTI):
    w_BTE = router._of(x_BTI @ router.v_PI.T)
    total = engine.model(x_BTI)
    for place, adapter in enumerate(engine.pool.adapters.values()):
        factors = adapter.layers["0"]
        total = total + w_BTE[..., place, None] * (x_BTI @ factors.a_RI.T @ factors.b_OR.T)
    return total


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 63)], ids=str)
def test_one_product_gives_scores_and_hidden_values(shape, engine):
    router, x_BTI = Squared(), torch.randn(*shape, NUM_INPUTS)
    with torch.no_grad():
        formula = expected(engine, router, x_BTI)
        with engine.activate(router):
            found = engine.model(x_BTI)
    assert router.calls == ["along"]
    assert torch.allclose(found, formula, rtol=1e-4, atol=1e-4 * float(formula.abs().max()))


def test_directions_that_change_count_from_then_on(engine):
    router, x_BTI = Squared(), torch.randn(2, 5, NUM_INPUTS)
    with torch.no_grad(), engine.activate(router):
        for _ in range(2):
            found = engine.model(x_BTI)
            with engine.activate({}):
                formula = expected(engine, router, x_BTI)
            assert torch.allclose(found, formula, rtol=1e-4, atol=1e-4 * float(formula.abs().max()))
            router.v_PI.mul_(0.5)


def test_gradients_go_through_the_router_itself(engine):
    router = Squared(learned=True)
    x_BTI = torch.randn(2, 5, NUM_INPUTS, requires_grad=True)
    grads = []
    for ours in (True, False):
        if ours:
            with engine.activate(router):
                found = engine.model(x_BTI)
        else:
            found = expected(engine, router, x_BTI)
        grads.append(torch.autograd.grad(found.sin().sum(), [x_BTI, router.v_PI]))
    assert router.calls == ["alone"]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_half_precision_leaves_the_scores_to_the_router(engine):
    router = Squared()
    engine.model.bfloat16()
    x_BTI = torch.randn(2, 5, NUM_INPUTS).bfloat16()
    with torch.no_grad(), engine.activate(router):
        engine.model(x_BTI)
        used = engine.last_weights["0"]
    assert router.calls == ["alone"]
    assert torch.equal(used, router._of(x_BTI.float() @ router.v_PI.T))


def test_the_directions_are_counted_as_memory(engine):
    router = Squared()
    with torch.no_grad(), engine.activate(router) as activation:
        engine.model(torch.randn(1, 2, NUM_INPUTS))
        assert activation.plan.num_bytes == 4 * (6 * (NUM_INPUTS + NUM_OUTPUTS) + 2 * NUM_INPUTS)
