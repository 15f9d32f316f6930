"""What tests of token routers share: random experts, inputs, routers as training may leave them, exact gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_adapter

from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router


@pytest.fixture(scope="session")
def random_pool():
    """random_pool({layer: (rank, inputs, outputs)}, ...): a pool of e0, e1, ..."""
    return lambda *experts: ExpertPool([random_adapter(f"e{n}", layers, n) for n, layers in enumerate(experts)])


@pytest.fixture
def x_BTI():
    return torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def trained_router():
    """trained_router(name, pool, spread, **options): in float64, with parameters that training may have left."""

    def make(name, pool, spread=1.0, **options):
        torch.manual_seed(2)
        made = router(name, pool, **options).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
        return made

    return make


class Weighing(torch.nn.Module):
    """A router's weights as the output of a module, whose parameters can be given."""

    def __init__(self, made, layer):
        super().__init__()
        self.made = made
        self.layer = layer

    def forward(self, x_BTI):
        return self.made.weights(x_BTI, self.layer)


@pytest.fixture(scope="session")
def has_exact_gradients():
    """has_exact_gradients(router, layer, x_BTI, names): of its weights to x and to the parameters of these names."""

    def check(made, layer, x_BTI, names):
        weighing, parameters = Weighing(made, layer), dict(made.named_parameters())

        def weights(x_BTI, *values):
            given = {f"made.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(weighing, given, (x_BTI,))

        arguments = [x_BTI, *(parameters[name].detach().clone() for name in names)]
        return torch.autograd.gradcheck(weights, [argument.requires_grad_() for argument in arguments])

    return check
