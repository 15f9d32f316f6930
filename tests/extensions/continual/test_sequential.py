"""Plain sequential training is ordinary training that begins where the last task ended."""

from __future__ import annotations

import torch

import loraweave as lw


def test_each_task_is_trained_from_the_adapter_of_the_one_before(course, tiny_llama, tokenizer):
    tasks = {"upper": [("a", "A"), ("b", "B"), ("c", "C")], "double": [("a", "aa"), ("bb", "bbbb")]}
    settings = {"rank": 2, "steps": 4, "batch_size": 2, "lr": 1e-2, "progress": False}
    found = course("sequential", tasks)
    first = lw.train_adapters(tiny_llama, tokenizer, {"upper": tasks["upper"]}, **settings)["upper"]
    start = {"double": first}
    second = lw.train_adapters(tiny_llama, tokenizer, {"double": tasks["double"]}, start=start, **settings)["double"]
    for own, expected in ((found["upper"], first), (found["double"], second)):
        for layer in expected.layers:
            # their optimisers round differently
            torch.testing.assert_close(own.delta(layer), expected.delta(layer), rtol=1e-4, atol=1e-6)
    assert found["double"].rank == 2
