"""A compiler that remembers nothing."""

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
