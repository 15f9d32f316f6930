"""What is made in a call below autocast, and kept, is as exact as what is made outside it."""

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live import row_weights
from loraweave.composer.live.kernels._parts import own_precision
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


@pytest.mark.parametrize("affine", [False, True], ids=["factors", "gain and bias"])
@pytest.mark.parametrize("path", ["merged", "shared"])
def test_a_mixture_first_used_below_autocast_is_exact_outside_it(path, affine, monkeypatch):
    monkeypatch.setattr(row_weights, "choose", lambda work: row_weights.Choice(path))
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(7, 5)
    a_RI, b_OR, gain_O, bias_O = (torch.randn(*shape, generator=generator) for shape in ((3, 7), (5, 3), (5,), (5,)))
    factors = Factors(a_RI, b_OR, gain_O, bias_O) if affine else Factors(a_RI, b_OR)
    engine = Composer(nn.Sequential(linear), [Adapter("a", "tiny", {"0": factors})])
    x = torch.randn(2, 3, 7, generator=generator)
    with torch.no_grad():
        update = x.double() @ (b_OR.double() @ a_RI.double()).T
        if affine:
            update += gain_O * (x.double() @ linear.weight.double().T) + bias_O
        wanted = linear(x).double() + 0.3 * update
        with engine.activate({"a": 0.3}), torch.autocast("cpu", torch.bfloat16):
            engine.model(x)
        with engine.activate({"a": 0.3}):
            found = engine.model(x)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_device_without_autocast_needs_nothing():
    with own_precision(torch.device("meta")):
        assert (torch.empty(2, 3, device="meta") @ torch.empty(3, 2, device="meta")).dtype == torch.float32
