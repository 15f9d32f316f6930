"""Adapters with parts that depend on the base, as plain factors: the same outputs within the error on the card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from loraweave.errors import AdapterUnsupported, BaseModelMismatch, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.hub.conversion import to_lora
from loraweave.lowrank import algebra
from loraweave.types import Factors


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 5, bias=False)


@pytest.fixture
def base():
    return Base()


def factors(num_out, num_in, rank=2, **parts):
    return Factors(torch.randn(rank, num_in), torch.randn(num_out, rank), **parts)


def whole(part, layer):
    """The dense update and bias of a layer, by the definition of factors, in float64."""
    part = algebra.bind(part, layer.weight, layer.bias)
    delta = part.b_OR.double() @ part.a_RI.double()
    if part.gain_O is not None:
        delta = delta + part.gain_O.double()[:, None] * layer.weight.detach().double()
    return delta, part.bias_O


def test_a_gain_becomes_part_of_the_matrix(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11), bias_O=torch.randn(11))})
    found = to_lora(adapter, base, max_error=1e-6).layers["up"]
    delta, bias = whole(adapter.layers["up"], base.up)
    assert found.gain_O is None
    torch.testing.assert_close(algebra.delta(found).double(), delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias_O, bias)


def test_doras_magnitude_becomes_part_of_the_matrix(base):
    adapter = Adapter("a", "base", {"down": factors(5, 11, magnitude_O=torch.rand(5) + 0.5)})
    found = to_lora(adapter, base, max_error=1e-6).layers["down"]
    weight = base.down.weight.detach().double()
    part = adapter.layers["down"]
    direction = weight + part.b_OR.double() @ part.a_RI.double()
    wanted = part.magnitude_O.double()[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight
    assert found.magnitude_O is None
    torch.testing.assert_close(algebra.delta(found).double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_trained_bias_becomes_a_difference_and_the_factors_stay(base):
    part = factors(11, 7, base_bias_O=torch.randn(11))
    alone = Factors(torch.zeros(0, 0), torch.zeros(11, 0), base_bias_O=part.base_bias_O)
    for given in (part, alone):
        found = to_lora(Adapter("a", "base", {"up": given}), base).layers["up"]
        torch.testing.assert_close(found.bias_O, part.base_bias_O - base.up.bias.detach())
        assert found.base_bias_O is None
        assert found.rank == given.rank
        assert found.a_RI.shape[1] == 7


def test_the_error_on_the_card_is_the_error_made(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11))})
    converted = to_lora(adapter, base, max_error=0.4)
    delta, _ = whole(adapter.layers["up"], base.up)
    note = converted.card["conversion"]["up"]
    lost = float((algebra.delta(converted.layers["up"]).double() - delta).norm() / delta.norm())
    assert lost == pytest.approx(note["relative_error"], abs=1e-6)
    assert 0 < lost <= 0.4
    assert converted.rank == note["rank"] < 7


def test_a_plain_layer_stays_as_it_is(base):
    plain = factors(5, 11)
    adapter = Adapter("a", "base", {"down": plain, "up": factors(11, 7, gain_O=torch.ones(11))})
    converted = to_lora(adapter, base)
    assert torch.equal(converted.layers["down"].a_RI, plain.a_RI)
    assert set(converted.card["conversion"]) == {"up"}


def test_the_given_adapter_and_model_are_unchanged(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11))})
    before, weights = adapter.hash, [parameter.clone() for parameter in base.parameters()]
    to_lora(adapter, base)
    assert Adapter("a", "base", adapter.layers).hash == before
    assert all(torch.equal(old, new) for old, new in zip(weights, base.parameters(), strict=True))


def test_a_rank_that_loses_too_much_is_refused_with_both_numbers(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11))})
    with pytest.raises(AdapterUnsupported, match=r"'a': layer 'up': rank 1 leaves.*max_error=0\.001"):
        to_lora(adapter, base, rank=1)


def test_another_base_model_is_refused(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11))}, fingerprint(base))
    other = Base()
    with torch.no_grad():
        other.up.weight += 1
    with pytest.raises(BaseModelMismatch, match="another base model"):
        to_lora(adapter, other)
    to_lora(adapter, base)


def test_a_layer_of_another_shape_is_refused(base):
    adapter = Adapter("a", "base", {"up": factors(11, 8, gain_O=torch.randn(11))})
    with pytest.raises(LayerMismatch, match=r"\(11, 8, 'linear'\).*\(11, 7, 'linear'\)"):
        to_lora(adapter, base)


def test_weights_without_values_are_refused(base):
    adapter = Adapter("a", "base", {"up": factors(11, 7, gain_O=torch.randn(11))})
    with pytest.raises(AdapterUnsupported, match="load the base model unquantised"):
        to_lora(replace(adapter), base.to("meta"))
