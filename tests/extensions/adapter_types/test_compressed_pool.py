"""Pools of adapters that a hub keeps in few bits are searched like any other."""

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave import registry
from loraweave.extensions.adapter_types.packings import compeft as ternary

methods = pytest.importorskip(f"{registry.EXTENSIONS}.methods")

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD")]
CLASSES = {name: registry.get("routers", name) for name in registry.names("routers")}
# those that need retrieval scores or weights have nothing to search, and the entropy may end where that of the base is lower
SEARCHES = [name for name, found in CLASSES.items() if hasattr(found, "ask") and found.learns and found.loss != "entropy"]
OPTIONS = {"grid": {"coordinate": True}}


@pytest.fixture
def compressed(tiny_llama, make_adapter):
    plain = [make_adapter(tiny_llama, name, targets=("q_proj", "down_proj"), seed=seed) for seed, name in enumerate("abc")]
    adapters = [methods.compeft(adapter, density=0.4) for adapter in plain]
    # in the order in which a hub gives them back: sums over layers round alike
    return [replace(adapter, layers=dict(sorted(adapter.layers.items()))) for adapter in adapters]


@pytest.fixture
def hub(tmp_path, compressed):
    found = lw.Hub(tmp_path / "hub")
    for adapter in compressed:
        found.add(adapter, stored_as="compeft")
    return found


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the streams that were decoded so far."""
    sizes, original = [], ternary.decode
    monkeypatch.setattr(ternary, "decode", lambda stream, size: sizes.append(size) or original(stream, size))
    return sizes


def compose(model, tokenizer, pool, method):
    task = lw.Task(EXAMPLES)
    options = {"budget": 24, "folds": 0, "seed": 3, "progress": False, **OPTIONS.get(method, {})}
    return lw.compose(model, tokenizer, pool, task, method=method, **options)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_finds_in_a_compressed_pool_what_it_finds_in_the_same_adapters_in_memory(
    method, tiny_llama, tokenizer, hub, compressed
):
    expected = compose(tiny_llama, tokenizer, lw.ExpertPool(compressed), method)
    found = compose(tiny_llama, tokenizer, hub.pool(lazy=True), method)
    if isinstance(expected.weights, dict):
        assert found.weights == expected.weights
    else:
        assert torch.equal(found.weights.values_BTLE, expected.weights.values_BTLE)
    assert found.report[method].loss == expected.report[method].loss


def test_what_comes_back_is_what_was_stored_to_the_bit(hub, compressed):
    for adapter in compressed:
        assert hub[adapter.name].hash == adapter.hash


def test_an_adapter_of_a_lazy_pool_is_decoded_when_it_is_first_used_and_once(tiny_llama, hub, decoded):
    pool = hub.pool(lazy=True)
    engine = lw.Composer(tiny_llama, pool)
    assert decoded == []
    with torch.no_grad():
        for _ in range(2):
            with engine.activate({"b": 0.5}):
                tiny_llama(input_ids=torch.tensor([[5, 9, 30]]))
    size = sum(tensor.numel() for factors in pool["b"].layers.values() for tensor in factors.tensors().values())
    assert decoded == [size]
