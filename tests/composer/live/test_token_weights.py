"""Weights that are made in a call fit it, or are refused by name."""

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.tokens._saved import router
from loraweave.types import Factors


class Constant:
    """A router of ones."""

    def __init__(self, *shape, dtype=torch.float32):
        self.w_BTE = torch.ones(shape, dtype=dtype)

    def weights(self, x_BTI, layer):
        return self.w_BTE


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return Composer(
        nn.Sequential(nn.Linear(4, 3)), [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})]
    )


@pytest.mark.parametrize(
    ("shape", "named"), [((0, 1, 1), "0 rows"), ((3, 1, 1), "3 rows"), ((1, 0, 1), "0 tokens")], ids=str
)
def test_weights_of_other_rows_or_tokens_are_named(shape, named, engine):
    with engine.activate(Constant(*shape)), pytest.raises(ScopeError, match=f"have {named}, but the input of layer '0'"):
        engine.model(torch.ones(2, 5, 4))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)], ids=["rows", "tokens"])
def test_a_batch_without_rows_or_tokens_is_mixed_by_a_router_of_many_experts(shape):
    adapters = [Adapter(name, "tiny", {"0": Factors(torch.ones(9, 4), torch.ones(3, 9))}) for name in "abcdef"]
    engine = Composer(nn.Sequential(nn.Linear(4, 3)).bfloat16(), adapters)
    with engine.activate(Constant(*shape[:2], 6)), torch.no_grad():
        assert engine.model(torch.ones(shape).bfloat16()).shape == (*shape[:2], 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_weights_of_any_dtype_count_as_numbers(dtype, engine):
    x_BTI = torch.randn(2, 5, 4)
    with engine.activate(Constant(1, 1, 1, dtype=dtype)):
        found = engine.model(x_BTI)
    assert found.dtype == torch.float32
    assert torch.allclose(found, engine.model(x_BTI) + x_BTI.sum(dim=-1, keepdim=True), atol=1e-5)


def test_a_router_answers_in_its_own_precision_below_autocast():
    draw = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(name, "tiny", {"0": Factors(torch.randn(3, 64, generator=draw), torch.randn(32, 3, generator=draw))})
        for name in ("a", "b", "c")
    ]
    engine = Composer(nn.Sequential(nn.Linear(64, 32)), adapters)
    made = router("arrow", adapters)
    x_BTI = torch.randn(2, 5, 64, generator=draw)
    with torch.no_grad(), engine.activate(made), torch.autocast("cpu", torch.bfloat16):
        engine.model(x_BTI)
    assert torch.equal(engine.last_weights["0"], made.weights(x_BTI, "0"))
