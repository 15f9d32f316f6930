"""AdaMerging: the entropy of predictions on unlabelled inputs, minimised as published."""

from __future__ import annotations

import pytest
import torch

from loraweave.extensions.routers.routers.adamerging import Adamerging

NAMES = ("a", "b")
LAYERS = ("l0", "l1", "l2")


class Entropy:
    """Mean Shannon entropy of a linear classifier W + sum over layers and experts of w_le D_le on unlabelled inputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        self.deltas = torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
        self.inputs = torch.randn(9, 7, generator=generator, dtype=torch.float64)
        self.seen = []

    def loss(self, w_LE):
        weight = self.base + torch.einsum("le,leoi->oi", w_LE.expand(3, 2), self.deltas)
        p = torch.softmax(self.inputs @ weight.T, dim=1)
        return -(p * p.log()).sum(dim=1).mean()

    def __call__(self, candidates):
        return self.gradients(candidates)[0]

    def gradients(self, candidates):
        (candidate,) = candidates
        values = candidate.values_BTLE.double().requires_grad_()
        loss = self.loss(values[0, 0])
        loss.backward()
        self.seen.append(values[0, 0].detach())
        return [float(loss.detach())], [values.grad]


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_weights_follow_adam_at_a_thousandth_from_three_tenths(layers):
    entropy = Entropy()
    Adamerging(NAMES, budget=20, layers=layers, lr=1e-3).solve(entropy)
    w_LE = torch.full((3 if layers else 1, 2), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w_LE], lr=1e-3)
    for seen_LE in entropy.seen:
        assert torch.allclose(seen_LE, w_LE, atol=1e-6)
        adam.zero_grad()
        entropy.loss(w_LE).backward()
        adam.step()
    assert len(entropy.seen) == 10


def test_the_entropy_falls_and_more_with_weights_by_layer():
    task_wise, layer_wise = Entropy(), Entropy()
    whole = Adamerging(NAMES, budget=80).solve(task_wise)
    by_layer = Adamerging(NAMES, budget=80, layers=LAYERS).solve(layer_wise)
    assert by_layer.loss < whole.loss < whole.losses[0] == pytest.approx(by_layer.losses[0])
    assert (whole.num_trained, by_layer.num_trained) == (2, 6)


def test_unless_told_otherwise_a_thousand_steps_of_a_thousandth_are_taken_and_fewer_are_longer():
    assert (Adamerging(NAMES).budget, Adamerging(NAMES).lr) == (2000, 1e-3)
    assert Adamerging(NAMES, budget=40).lr == 0.05
    assert Adamerging(NAMES, budget=None, seconds=1.0).lr == 1e-3


def test_weights_are_by_layer_unless_they_are_to_be_task_wise():
    assert Adamerging(NAMES, layers=LAYERS).num_trained == 6
    assert Adamerging(NAMES, layers=LAYERS, by_layer=False).num_trained == 2


def test_weights_can_be_clamped_to_0_and_1_as_in_one_of_the_published_forms():
    entropy = Entropy()
    Adamerging(NAMES, budget=200, lr=0.1, layers=LAYERS, low=0.0, high=1.0).solve(entropy)
    seen = torch.stack(entropy.seen)
    assert (seen.min(), seen.max()) == (0.0, 1.0)
