"""A compiler that remembers nothing, and every kernel as a function of stacked factors."""

import pytest
import torch
from kernel_products import by_rank_rows


@pytest.fixture(scope="session")
def product():
    """`by_rank_rows`."""
    return by_rank_rows


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
