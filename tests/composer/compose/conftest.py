"""A pool of three adapters for the tiny model, of different ranks and layers."""

from __future__ import annotations

import pytest

import loraweave as lw


@pytest.fixture
def pool(tiny_llama, make_adapters):
    return lw.ExpertPool(make_adapters(tiny_llama, "llama"))
