"""Pools of adapters that were trained to first order are searched like any other."""

import pytest
import torch

import loraweave as lw
from loraweave import registry
from loraweave.extensions.continual import Linearized

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD")]
CLASSES = {name: registry.get("routers", name) for name in registry.names("routers")}
# those that need retrieval scores or weights have nothing to search, and the entropy may end where that of the base is lower
SEARCHES = [name for name, found in CLASSES.items() if hasattr(found, "ask") and found.learns and found.loss != "entropy"]
OPTIONS = {"grid": {"coordinate": True}}


def compose(model, tokenizer, pool, method):
    options = {"budget": 24, "folds": 0, "seed": 3, "progress": False, **OPTIONS.get(method, {})}
    return lw.compose(model, tokenizer, pool, lw.Task(EXAMPLES), method=method, **options)


@pytest.mark.parametrize("method", [name for name in SEARCHES if name != "lorahub_original"])
def test_a_search_over_linearised_adapters_gives_their_superposition(method, tiny_llama, tokenizer):
    tasks = {"swap": EXAMPLES[:2], "double": [("a", "aa"), ("bb", "bbbb")]}
    settings = {"rank": 2, "steps": 20, "lr": 2e-2, "batch_size": 2, "progress": False, "kind": Linearized()}
    pool = lw.ExpertPool(lw.train_adapters(tiny_llama, tokenizer, tasks, **settings))
    found = compose(tiny_llama, tokenizer, pool, method)
    assert found.report.chosen == method
    weights = (
        found.weights if isinstance(found.weights, lw.MixtureWeights) else lw.MixtureWeights.of(found.weights, pool.names)
    )
    for layer, swap in pool["swap"].layers.items():
        place = weights.layers.index(layer) if weights.layers else 0
        w_E = weights.values_BTLE[0, 0, place]
        # a is common to all, so that the superposition has it too, and the weighted sum of b
        b_OR = sum(w * pool[name].layers[layer].b_OR for w, name in zip(w_E, weights.experts, strict=True))
        assert torch.allclose(found.adapter.delta(layer), b_OR @ swap.a_RI, atol=1e-5)
