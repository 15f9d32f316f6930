"""The engine that most tests of live mixing ask, and a compiler that remembers nothing."""

import pytest
import torch

from loraweave.composer.composer import Composer


@pytest.fixture
def engine(tiny_llama, make_adapters):
    """Of experts "a", "b" and "c" of different ranks."""
    return Composer(tiny_llama, make_adapters(tiny_llama, "llama"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
