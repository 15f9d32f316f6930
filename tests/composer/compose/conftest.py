"""Five examples of a task, pools, and compose() of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose import learning
from loraweave.composer.model.batches import batch, encode, mean_losses


@pytest.fixture
def dora_pool(tiny_llama, make_adapter):
    """Two adapters with magnitudes a tenth above the base's."""

    def dora(adapter):
        norms = {name: tiny_llama.get_submodule(name).weight.detach().norm(dim=1) for name in adapter.layers}
        return replace(adapter, layers={n: replace(each, magnitude_O=1.1 * norms[n]) for n, each in adapter.layers.items()})

    return lw.ExpertPool([dora(make_adapter(tiny_llama, name, seed=seed)) for seed, name in enumerate("ab")])


@pytest.fixture
def task():
    return lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")], instruction="swap")


@pytest.fixture
def compose_on(tiny_llama, tokenizer, pool, task):
    """compose(), by default of the pool for the task on the tiny model, without a bar."""

    def run(given=pool, *, model=tiny_llama, task=task, **options):
        return lw.compose(model, tokenizer, given, task, **{"progress": False, **options})

    return run


@pytest.fixture
def interrupt_search(monkeypatch):
    """interrupt_search(): the second time from now on that candidates are scored is interrupted, once."""

    def interrupt():
        original, calls = learning.together, count()

        def interrupted(objectives, candidates):
            if next(calls) == 1:
                raise KeyboardInterrupt
            return original(objectives, candidates)

        monkeypatch.setattr(learning, "together", interrupted)

    return interrupt


@pytest.fixture
def losses_alone(tokenizer, task):
    """losses_alone(model): the mean target loss of each of the task's examples, or of others, one row at a time."""

    def losses(model, examples=task.examples):
        rows = encode(model, tokenizer, [task.prompt(text) for text, _ in examples], [target for _, target in examples])
        with torch.no_grad():
            return [float(mean_losses(model, batch(model, tokenizer, [row]))[0]) for row in rows]

    return losses
