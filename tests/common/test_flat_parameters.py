"""Parameters in one memory, against the same parameters apart."""

from __future__ import annotations

import pytest
import torch

from loraweave.common.descent import FlatParameters


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
