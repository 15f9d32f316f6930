"""Task arithmetic: adapters of the same base, summed."""

from __future__ import annotations

import torch

import loraweave as lw

SETTINGS = {"rank": 2, "steps": 4, "batch_size": 2, "lr": 1e-2, "progress": False}


def test_the_model_is_the_weighted_sum_of_adapters_trained_alone(course, tiny_llama, tokenizer):
    tasks = {"upper": [("a", "A"), ("b", "B")], "double": [("a", "aa"), ("bb", "bbbb")]}
    found = course("task_arithmetic", tasks, weight=0.7)
    alone = lw.train_adapters(tiny_llama, tokenizer, tasks, **SETTINGS)
    for layer in alone["upper"].layers:
        first, second = (alone[name].delta(layer) for name in tasks)
        assert torch.allclose(found["upper"].delta(layer), 0.7 * first, atol=1e-5)
        assert torch.allclose(found["double"].delta(layer), 0.7 * (first + second), atol=1e-5)


def test_the_order_of_tasks_does_not_change_the_last_model(course):
    tasks = {"upper": [("a", "A"), ("b", "B")], "double": [("a", "aa")], "count": [("one", "1"), ("two", "2")]}
    first, second = (list(course("task_arithmetic", t).values())[-1] for t in (tasks, dict(reversed(tasks.items()))))
    for layer in first.layers:
        assert torch.allclose(first.delta(layer), second.delta(layer), atol=1e-5)


def test_with_weight_0_the_model_is_the_base(course):
    for adapter in course("task_arithmetic", weight=0.0).values():
        assert not any(adapter.delta(layer).any() for layer in adapter.layers)


def test_tuning_on_exemplars_goes_on_from_the_sum(course, tiny_llama, tokenizer):
    from loraweave.composer.model.scoring import losses

    plain, tuned = course("task_arithmetic"), course("task_arithmetic", exemplars=2, tuning_steps=20)
    assert [adapter.rank for adapter in tuned.values()] == [2, 4, 6]
    engine = lw.Composer(tiny_llama, {"plain": plain["count"], "tuned": tuned["count"]})
    pairs = [("a", "A"), ("b", "B"), ("bb", "bbbb"), ("one", "1"), ("two", "2")]
    found = {}
    for name in ("plain", "tuned"):
        with engine.activate({name: 1.0}):
            found[name] = sum(losses(tiny_llama, tokenizer, lw.Task(pairs), pairs))
    assert found["tuned"] < found["plain"]
