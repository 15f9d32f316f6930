"""The random numbers of the process after a training."""

import random

import numpy as np
import pytest
import torch

from loraweave.common.descent import caller_randomness


def seeded(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


@caller_randomness()
def failing():
    seeded(0)
    raise KeyError


def test_they_go_on_where_they_were_also_after_an_error():
    seeded(1)
    expected = drawn()
    seeded(1)
    with pytest.raises(KeyError):
        failing()
    assert drawn() == expected
