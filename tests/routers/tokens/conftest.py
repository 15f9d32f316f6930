"""What tests of token routers share: experts of random factors, inputs, and routers as training may leave them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_adapter

from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router


@pytest.fixture(scope="session")
def random_pool():
    """random_pool({layer: (rank, inputs, outputs)}, ...): a pool of e0, e1, ..."""
    return lambda *experts: ExpertPool([random_adapter(f"e{n}", layers, n) for n, layers in enumerate(experts)])


@pytest.fixture
def x_BTI():
    return torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def trained_router():
    """trained_router(name, pool, spread, **options): in float64, with parameters that training may have left."""

    def make(name, pool, spread=1.0, **options):
        torch.manual_seed(2)
        made = router(name, pool, **options).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
        return made

    return make
