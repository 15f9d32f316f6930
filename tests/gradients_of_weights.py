"""What tests of routers share: gradients of weights by finite differences."""

from __future__ import annotations

import pytest
import torch


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
