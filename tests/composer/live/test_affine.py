"""Gains and biases of a row's own experts are all that it gets of them."""

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

ROWS = [{"plain": 1.0}, {"gain": 1.0}, None, {"bias": 1.0}]
BY_TOKEN = MixtureWeights(
    torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]).view(4, 1, 1, 3).expand(4, 2, 1, 3),
    ("plain", "gain", "bias"),
)


@pytest.mark.parametrize("mixture", [ROWS, BY_TOKEN], ids=["by row", "by token"])
@torch.no_grad()
def test_a_neighbours_gain_changes_no_row_whose_base_has_overflowed(mixture):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).half()
    model[0].weight.fill_(3e4)
    a_RI, b_OR, gain_O, bias_O = torch.ones(1, 4), torch.ones(3, 1), torch.full((3,), 0.5), torch.ones(3)
    experts = {"plain": Factors(a_RI, b_OR), "gain": Factors(a_RI, b_OR, gain_O), "bias": Factors(a_RI, b_OR, None, bias_O)}
    engine = Composer(model, [Adapter(name, "tiny", {"0": factors}) for name, factors in experts.items()])
    x_BTI = torch.ones(4, 2, 4).half()
    with engine.activate(mixture):
        assert torch.equal(model(x_BTI), torch.full((4, 2, 3), torch.inf).half())
