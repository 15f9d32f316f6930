"""Prefix composition: every past model is there, and a task begins as the one before."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.train.passes import own_parts
from loraweave.errors import LayerMismatch

UPPER = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
DOUBLE = [("a", "aa"), ("bb", "bbbb"), ("c", "cc")]


def test_ranks_add_up_and_every_prefix_is_a_past_model_to_the_bit(course):
    found = course("construct_vl")
    assert [adapter.rank for adapter in found.values()] == [2, 4, 6]
    last = found["count"]
    for number, adapter in enumerate(found.values(), start=1):
        for layer, factors in adapter.layers.items():
            assert torch.equal(factors.a_RI, last.layers[layer].a_RI[: 2 * number])
            assert torch.equal(factors.b_OR, last.layers[layer].b_OR[:, : 2 * number])


def test_executing_the_adapters_up_to_a_task_is_its_model_after_later_tasks(course, tiny_llama):
    found = course("construct_vl")
    parts = own_parts(found)
    engine = lw.Composer(
        tiny_llama, {**parts, "past model": course("construct_vl", {"upper": UPPER, "double": DOUBLE})["double"]}
    )
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        with engine.activate({"upper": 1.0, "double": 1.0}):
            executed = tiny_llama(input_ids=ids).logits
        with engine.activate({"past model": 1.0}):
            expected = tiny_llama(input_ids=ids).logits
    assert torch.allclose(executed, expected, atol=1e-5)


def test_a_task_begins_as_the_model_before_it(course, tiny_llama, tokenizer, monkeypatch):
    from loraweave.composer.train.ordered import _course

    losses = []
    original = _course.job_losses

    def noted(model, tokenizer, rows, num_jobs):
        found = original(model, tokenizer, rows, num_jobs)
        losses.append((rows, float(found.detach())))
        return found

    monkeypatch.setattr(_course, "job_losses", noted)
    before = course("construct_vl")["upper"]
    rows, first_loss = losses[4]
    with torch.no_grad(), lw.Composer(tiny_llama, [before]).activate({"upper": 1.0}):
        expected = float(original(tiny_llama, tokenizer, rows, 1))
    assert first_loss == pytest.approx(expected, abs=1e-5)


def test_the_parts_are_what_each_task_added_also_to_a_start(course, tiny_llama, make_adapter):
    begin = make_adapter(tiny_llama, "begin", rank=3, targets=("q_proj", "down_proj"), seed=4)
    found = course("construct_vl", settings={"start": {"upper": begin}})
    parts = own_parts(found, start=begin)
    assert {name: part.rank for name, part in parts.items()} == dict.fromkeys(found, 2)
    for layer in found["count"].layers:
        terms = [term.delta(layer) for term in (begin, *parts.values()) if layer in term.layers]
        assert torch.allclose(sum(terms), found["count"].delta(layer), atol=1e-5)


def test_adapters_that_are_no_prefixes_have_no_parts(course):
    with pytest.raises(LayerMismatch, match="of task 'double' does not begin with the one before"):
        own_parts(course("sequential"))
