"""Adam without torch's state: the same steps as torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.routers.searches._forms import Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.8, 0.0)])
def test_the_steps_are_those_of_torch(betas):
    gradients = np.random.default_rng(0).normal(size=(7, 5)) * np.logspace(-6, 3, 5)
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.03, betas=betas)
    ours, place = Adam(5, betas), np.zeros(5)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
        place = place + ours.step(gradient, 0.03)
        assert place == pytest.approx(parameter.detach().numpy(), rel=1e-9, abs=1e-12)
