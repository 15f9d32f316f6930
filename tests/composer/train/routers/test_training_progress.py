"""What a training keeps on its way."""

import math

import pytest
import torch

from loraweave.composer.train.progress import TrainingProgress
from loraweave.composer.train.settings import TrainingSettings
from loraweave.composer.train.state import KeptState
from loraweave.errors import TrainingError


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 1), (7,))]


@pytest.fixture
def progress(parameters):
    settings = TrainingSettings(lr=0.1, steps=9, evaluation=[1], patience=2)
    seen = {"experts_of_layers": [(0, 1)], "taught": {0, 1}}
    return TrainingProgress(
        parameters, settings, ("a", "b"), KeptState(None, ""), learner="router 'x'", owner="router", **seen
    )


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def moved(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    return copies(parameters)


def test_a_value_that_is_not_finite_puts_the_last_good_parameters_back_bit_for_bit(progress, parameters):
    progress.good(0)
    good = moved(parameters)
    progress.good(1)
    moved(parameters)
    with pytest.raises(TrainingError, match=r"term 'z' is inf at step 3 of router 'x'.* The router has .* after 1 steps"):
        progress.judge(3, 0.0, {"z": math.inf})
    assert all(map(torch.equal, parameters, good))


def test_without_a_good_step_the_parameters_are_those_of_the_beginning(progress, parameters):
    begun = copies(parameters)
    moved(parameters)
    assert progress.put_back() == "The router has the parameters after 0 steps"
    assert all(map(torch.equal, parameters, begun))


def test_the_norm_is_that_of_all_gradients_and_those_that_are_missing_become_0(progress, parameters):
    parameters[0].grad = torch.tensor([[3.0], [0.0], [-4.0]])
    assert progress.judge(1, 0.5, {}) == 5.0
    assert torch.equal(parameters[1].grad, torch.zeros(7))


def test_the_best_of_the_evaluations_stays_and_patience_ends_the_training(progress, parameters):
    progress.note_evaluation(2, 1.5)
    best = moved(parameters)
    progress.note_evaluation(4, 0.5)
    moved(parameters)
    progress.note_evaluation(6, 0.5)
    assert not progress.stops
    progress.note_evaluation(8, 2.0)
    assert progress.stops
    assert progress.finish()["kept"] == 4
    assert all(map(torch.equal, parameters, best))
