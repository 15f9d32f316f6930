"""Steps down a gradient."""

import pytest
import torch

from loraweave.common.descent import Descent
from loraweave.composer.train.schedule import Pace


@pytest.mark.parametrize("length", [0.5, 3.0])
def test_steps_are_adamw_on_the_gradient_shortened_to_1_at_the_rates_of_the_pace(length):
    pace = Pace(steps=5, lr=0.1, batch_size=1, seed=0, warmup=2)
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 5), (1,)]
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = torch.cat([parameter.flatten() for parameter in parameters])
    descent = Descent([parameter.requires_grad_() for parameter in parameters], pace.rate)
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for number, rate in enumerate((0.05, 0.1, 0.1), start=1):
        gradient = torch.randn(16, generator=generator, dtype=torch.float64)
        gradient *= length / gradient.norm()
        for parameter, part in zip(parameters, gradient.split([15, 1]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        descent.step(number - 1)
        clipped = gradient * min(1.0, 1 / length)
        first = 0.9 * first + 0.1 * clipped
        second = 0.999 * second + 0.001 * clipped**2
        expected -= rate * first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
    found = torch.cat([parameter.detach().flatten() for parameter in parameters])
    # the norm is taken with 1e-6 added to it
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
