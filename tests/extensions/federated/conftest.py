"""Small clients, and a few rounds with them."""

from __future__ import annotations

import pytest
from installed import require_entry

from loraweave.extensions.federated import federate as run_rounds

SETTINGS = {"rank": 2, "steps": 3, "batch_size": 2, "lr": 1e-2, "rounds": 2, "progress": False}


@pytest.fixture(autouse=True)
def recipe_of_the_strategy(request):
    """FedMS trains a recipe that another extension has, which may have been taken away."""
    if "fedms" in request.node.name:
        require_entry("experts", "fedms")


@pytest.fixture
def clients():
    """Three clients of 4, 3 and 2 examples."""
    return {
        "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")],
        "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
        "count": [("one", "1"), ("two", "2")],
    }


@pytest.fixture
def federate(tiny_llama, tokenizer, clients):
    """federate("ffa", rounds=1, clip=0.5): a few rounds on a tiny model; what is no setting is an option of the strategy."""

    def run(strategy, *, clients=clients, model=tiny_llama, options=None, **settings):
        return run_rounds(model, tokenizer, clients, strategy=strategy, strategy_options=options, **{**SETTINGS, **settings})

    return run
