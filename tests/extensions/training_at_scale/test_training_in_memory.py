"""Trainings that keep their steps within the memory that they may take."""

from __future__ import annotations

import pytest
import torch
from watched_steps import watch_steps as watch_steps

import loraweave as lw
from loraweave.composer.train import shared as shared_training
from loraweave.errors import BudgetExceeded
from loraweave.extensions.training_at_scale import step_memory

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")],
    "spell": [("abc", "a b c"), ("fed", "f e d"), ("no", "n o")],
}


def train(model, tokenizer, tasks=TASKS, **options):
    settings = {"rank": 3, "steps": 12, "batch_size": 2, "lr": 2e-2, "progress": False, "jobs_per_batch": 2}
    return lw.train_adapters(model, tokenizer, tasks, **{**settings, **options})


def test_with_less_memory_fewer_jobs_share_a_step_and_come_out_the_same(tiny_llama, tokenizer, watch_steps):
    whole = train(tiny_llama, tokenizer, jobs_per_batch=4)
    steps = watch_steps()
    memory = int(whole.report.estimated_bytes * 0.8)
    found = train(tiny_llama, tokenizer, jobs_per_batch=4, memory_bytes=memory)
    assert 1 < max(len(counts) for _, counts in steps) < 4
    assert found.report.estimated_bytes <= memory < whole.report.estimated_bytes
    for name, adapter in whole.items():
        for layer, factors in adapter.layers.items():
            assert torch.allclose(found[name].layers[layer].b_OR, factors.b_OR, atol=1e-5)


def test_a_job_that_does_not_fit_alone_is_refused_before_the_first_step(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(shared_training, "range_losses", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(BudgetExceeded, match=r"takes about 0\.00 GB alone \(2 rows of up to \d+ tokens.*raise memory_bytes"):
        train(tiny_llama, tokenizer, memory_bytes=1000)


def test_a_job_that_other_processes_leave_no_memory_for_is_refused_with_a_way_out(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(step_memory, "step_budget", lambda *_: 1000)
    way_out = "shorten its longest examples, end other processes that use that memory, or pass memory_bytes to train all"
    with pytest.raises(BudgetExceeded, match=rf"0\.00 GB are free on cpu, the base's included; {way_out} the same$"):
        train(tiny_llama, tokenizer)
    assert set(train(tiny_llama, tokenizer, memory_bytes=10**9)) == set(TASKS)


@pytest.mark.parametrize("method", ["few_shot", "auto"])
def test_where_memory_is_used_up_compose_names_a_method_that_trains_nothing(
    tiny_llama, tokenizer, pool, monkeypatch, method
):
    monkeypatch.setattr(step_memory, "step_budget", lambda *_: 1000)
    task = lw.Task(TASKS["upper"], instruction="upper")
    with pytest.raises(BudgetExceeded, match=r"are free on cpu, .*\. compose\(\) takes no .*'lorahub' trains no adapter$"):
        lw.compose(tiny_llama, tokenizer, pool, task, method=method, progress=False)
    asked = {"method": "lorahub", "budget": 9, "folds": 0, "progress": False}
    assert lw.compose(tiny_llama, tokenizer, pool, task, **asked).report.chosen


def test_a_refusal_says_how_many_rows_a_step_would_fit(tiny_llama, tokenizer):
    one = {"upper": TASKS["upper"]}
    most = train(tiny_llama, tokenizer, one, batch_size=5).report.estimated_bytes
    memory = (most + train(tiny_llama, tokenizer, one, batch_size=4).report.estimated_bytes) // 2
    with pytest.raises(BudgetExceeded, match=r"\(5 rows .* are allowed; lower batch_size to 4, shorten its longest"):
        train(tiny_llama, tokenizer, one, batch_size=5, memory_bytes=memory)
    assert set(train(tiny_llama, tokenizer, one, batch_size=4, memory_bytes=memory)) == set(one)
