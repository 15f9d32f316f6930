"""Steps down a gradient."""

import pytest
import torch
from rich.progress import Progress

from loraweave.common.descent import Descent, descend
from loraweave.composer.train.schedule import Pace
from loraweave.errors import TrainingError

BAR = Progress(disable=True)


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


def learners_of(sizes):
    """Parameters of 1 each, and their descents at the rate 0.1."""
    parameters = {name: torch.ones(size, requires_grad=True) for name, size in sizes.items()}
    return parameters, {name: Descent([own], lambda _: 0.1) for name, own in parameters.items()}


def losses_of(parameters):
    return lambda step: torch.stack([(own - step).square().sum() for own in parameters.values()])


def test_learners_that_take_steps_together_end_at_the_bits_of_each_alone():
    together, descents = learners_of({"a": 3, "b": 5})
    descend(descents, losses_of(together), 4, BAR, title="")
    for name, own in together.items():
        alone, descent = learners_of({name: len(own)})
        descend(descent, losses_of(alone), 4, BAR, title="")
        assert torch.equal(own, alone[name])


def test_steps_that_were_taken_before_are_left_out_and_each_other_one_is_told_after_it():
    parameters, descents = learners_of({"a": 2})
    taken = []
    descend(descents, losses_of(parameters), 5, BAR, title="", first=3, after_step=taken.append)
    assert taken == [3, 4]


def test_a_loss_that_is_not_finite_ends_the_steps_with_its_learner_named_and_nothing_changed():
    parameters, descents = learners_of({"a": 2, "job 'b'": 2})

    def losses(step):
        return losses_of(parameters)(step) * torch.tensor([1.0, float("nan")])

    with pytest.raises(TrainingError, match="the loss of job 'b' is nan at step 1; lower lr"):
        descend(descents, losses, 5, BAR, title="")
    assert all(bool((own == 1).all()) for own in parameters.values())
