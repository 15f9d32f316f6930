"""One job on its way."""

import math

import pytest
import torch

from loraweave.composer.train.jobs import LoraJob, PlannedJob
from loraweave.composer.train.rows import HeldOut
from loraweave.composer.train.schedule import Pace
from loraweave.composer.train.shared import JobProgress


def begun(patience=None):
    job = LoraJob("x", {"layer": (torch.zeros(1, 3), torch.zeros(2, 1))}, scale=1.0)
    pace = Pace(steps=9, lr=0.1, batch_size=1, seed=0, warmup=0)
    return JobProgress(PlannedJob("x", lambda: job, 5, [], pace, HeldOut([], every=1, patience=patience)))


def went_on(progress, loss):
    """A step, after which all parameters are its number, and the held-out loss there."""
    progress.take_step(0.5, 3)
    with torch.no_grad():
        for parameter in progress.job.parameters():
            parameter.fill_(progress.step)
    progress.note_evaluation(loss)


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 2), ([1.0, 1.0, 1.0], 1), ([math.nan, 2.0, 3.0], 2), ([2.0, math.nan, 1.0], 3)]
)
def test_the_job_ends_with_the_first_of_its_lowest_held_out_losses(losses, best):
    progress = begun()
    progress.note_evaluation(0.0)
    for loss in losses:
        went_on(progress, loss)
    report = progress.finish()
    assert (report.steps, report.best_step) == (3, best)
    assert all(bool((parameter == best).all()) for parameter in progress.job.parameters())


def test_a_job_whose_state_is_taken_up_has_waited_as_long_and_has_the_same_best():
    progress, again = begun(patience=2), begun(patience=2)
    for loss in (3.0, 1.0, 2.0):
        went_on(progress, loss)
    again.restore(progress.state())
    assert again.stopped is None
    went_on(again, 1.0)
    assert again.stopped == "no lower held-out loss in 2 evaluations"
    assert again.finish().best_step == 2
    assert all(bool((parameter == 2).all()) for parameter in again.job.parameters())
