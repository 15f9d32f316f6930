"""GenKnowSub of a whole pool."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.merge.arithmetic import genknowsub
from loraweave.errors import WeightingError


def test_the_mean_of_the_general_updates_is_subtracted_from_each(make_model, make_adapter):
    model = make_model("llama")
    tasks = [make_adapter(model, f"task {n}", rank=2, targets=("q_proj", "v_proj"), seed=n) for n in range(3)]
    generals = [make_adapter(model, f"general {n}", rank=3 + n, targets=("q_proj",), seed=9 + n) for n in range(2)]
    pool = genknowsub(tasks, generals, progress=False)
    assert pool.names == ("task 0", "task 1", "task 2")
    for task in tasks:
        for layer in task.layers:
            mean_OI = sum(g.delta(layer).double() for g in generals if layer in g.layers) / 2
            expected_OI = task.delta(layer).double() - mean_OI
            assert torch.allclose(pool[task.name].delta(layer).double(), expected_OI, atol=1e-5)


def test_without_general_adapters_it_says_so(make_model, make_adapter):
    task = make_adapter(make_model("llama"), "task", rank=2, targets=("q_proj",), seed=0)
    with pytest.raises(WeightingError, match="got none"):
        genknowsub([task], [])
