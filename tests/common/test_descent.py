"""Steps down a gradient."""

from __future__ import annotations

import pytest
import torch
from rich.progress import Progress

from loraweave.common.descent import Descent, FlatParameters, descend
from loraweave.composer.train.jobs import Pace
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


def parameters():
    generator = torch.Generator().manual_seed(4)
    shapes = [(3, 5), (7, 2), (), (4,)]
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    # laid out by columns, and with gaps
    made.append(torch.randn(3, 6, generator=generator).T.detach().requires_grad_())
    made.append(torch.randn(4, 9, generator=generator)[:, ::2].detach().requires_grad_())
    return [*made, torch.randn(5, generator=generator).double().requires_grad_()]


def loss_of(tensors, step):
    return sum((tensor.double() * (index + 1) - step).square().sum() for index, tensor in enumerate(tensors))


def test_gathering_keeps_values_shapes_and_identity():
    before, tensors = parameters(), parameters()
    flat = FlatParameters(tensors)
    assert [vector.dtype for vector in flat.vectors] == [torch.float32, torch.float64]
    for own, expected in zip(tensors, before, strict=True):
        assert own.is_leaf
        assert torch.equal(own, expected)
    assert tensors[4].stride() == (1, 6)


def test_steps_on_the_vectors_are_steps_on_the_parameters():
    apart, together = parameters(), parameters()
    flat = FlatParameters(together)
    single = torch.optim.AdamW(apart, lr=0.1, weight_decay=0.0)
    joint = torch.optim.AdamW(flat.vectors, lr=0.1, weight_decay=0.0)
    for step in range(4):
        loss_of(apart, step).backward()
        loss_of(together, step).backward()
        norms = [float(torch.nn.utils.clip_grad_norm_(tensors, 1.0)) for tensors in (apart, flat.vectors)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        single.step()
        joint.step()
        single.zero_grad()
        flat.zero_grad()
    for own, expected in zip(together, apart, strict=True):
        assert not own.grad.any()
        assert torch.allclose(own, expected, atol=1e-6)
