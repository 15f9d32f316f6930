"""Prefix composition: every past model is there, and a task begins as the one before."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.model.batches import batch
from loraweave.composer.model.scoring import encode_pairs
from loraweave.errors import LayerMismatch
from loraweave.extensions.continual import own_parts
from loraweave.extensions.continual.continual import construct_vl

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
    found = course("construct_vl", replay=0.0)
    parts = own_parts(found)
    engine = lw.Composer(
        tiny_llama, {**parts, "past model": course("construct_vl", {"upper": UPPER, "double": DOUBLE}, replay=0.0)["double"]}
    )
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        with engine.activate({"upper": 1.0, "double": 1.0}):
            executed = tiny_llama(input_ids=ids).logits
        with engine.activate({"past model": 1.0}):
            expected = tiny_llama(input_ids=ids).logits
    assert torch.allclose(executed, expected, atol=1e-5)


def test_a_task_begins_as_the_model_before_it(course, tiny_llama, tokenizer, monkeypatch):
    from loraweave.extensions.continual import course as course_module

    losses = []
    original = course_module.job_losses

    def noted(model, tokenizer, rows, num_jobs):
        found = original(model, tokenizer, rows, num_jobs)
        losses.append((rows, float(found.detach())))
        return found

    monkeypatch.setattr(course_module, "job_losses", noted)
    before = course("construct_vl", replay=0.0)["upper"]
    rows, first_loss = losses[4]
    with torch.no_grad(), lw.Composer(tiny_llama, [before]).activate({"upper": 1.0}):
        expected = float(original(tiny_llama, tokenizer, rows, 1))
    assert first_loss == pytest.approx(expected, abs=1e-5)


def test_the_parts_are_what_each_task_added_also_to_a_start(course, tiny_llama, make_adapter):
    begin = make_adapter(tiny_llama, "begin", rank=3, targets=("q_proj", "down_proj"), seed=4)
    found = course("construct_vl", settings={"start": {"upper": begin}}, attacks=1)
    parts = own_parts(found, start=begin)
    assert {name: part.rank for name, part in parts.items()} == dict.fromkeys(found, 2)
    for layer in found["count"].layers:
        terms = [term.delta(layer) for term in (begin, *parts.values()) if layer in term.layers]
        assert torch.allclose(sum(terms), found["count"].delta(layer), atol=1e-5)


class Dense:
    """A model with an adapter's dense updates in its weights, asked by embeddings: p of a row's target, and its slope."""

    def __init__(self, make_model, adapter):
        self.model = make_model("llama").requires_grad_(False)
        for layer, factors in adapter.layers.items():
            self.model.get_submodule(layer).weight += factors.b_OR @ factors.a_RI

    def embedded(self, row):
        return self.model.get_input_embeddings()(torch.tensor([[*row.prompt, *row.target]]))

    def p(self, row, embedded):
        logits_TV = self.model(inputs_embeds=embedded).logits[0].log_softmax(dim=-1)
        first = len(row.prompt)
        return torch.stack([logits_TV[first + n - 1, token] for n, token in enumerate(row.target)]).mean().exp()

    def attack(self, row, attacks, size):
        moved = self.embedded(row)
        for _ in range(attacks):
            moved = moved.detach().requires_grad_()
            self.p(row, moved).backward()
            moved = moved - size * moved.grad.sign()
        return moved.detach()


def test_the_replay_asks_the_new_model_to_doubt_where_an_attacked_past_one_does(
    course, tiny_llama, make_model, tokenizer, tasks, monkeypatch
):
    from loraweave.extensions.continual import course as course_module

    seen, original = [], course_module.descend

    def noted(learners, losses, *rest, **settings):
        def once(step):
            found = losses(step)
            seen.append((step, float(found.detach())))
            return found

        return original(learners, once, *rest, **settings)

    monkeypatch.setattr(course_module, "descend", noted)
    chosen = {"batch_size": 2, "steps": 3}
    found = course("construct_vl", replay=1.7, attacks=2, attack_size=0.2, settings=chosen)
    with_replay = [loss for step, loss in seen if step == 0][2]
    rows = encode_pairs(tiny_llama, tokenizer, lw.Task.of(tasks["count"]), lw.Task.of(tasks["count"]).examples)
    # the third task begins as the second, which adds nothing: the first past model alone has another p
    past, new = Dense(make_model, found["upper"]), Dense(make_model, found["double"])
    terms, plain = [], []
    for row in rows:
        moved = past.attack(row, 2, 0.2)
        doubt = past.p(row, past.embedded(row)) - past.p(row, moved)
        terms.append(abs(float(doubt - (new.p(row, new.embedded(row)) - new.p(row, moved)))))
        plain.append((-float(new.p(row, new.embedded(row)).log()), len(row.target)))
    mean = sum(loss * count for loss, count in plain) / sum(count for _, count in plain)
    assert with_replay == pytest.approx(mean + 1.7 * sum(terms) / len(terms), rel=1e-4)
    assert sum(terms) > 1e-3


@pytest.mark.own_models
def test_an_attack_leaves_padding_alone_and_the_models_embeddings_as_they_were(tiny_llama, tokenizer):
    task = lw.Task.of([("a longer text", "A"), ("b", "B")])
    stacked = batch(tiny_llama, tokenizer, encode_pairs(tiny_llama, tokenizer, task, task.examples))
    tiny_llama.requires_grad_(False)
    doubt_B, moved_BTI = construct_vl.attacked(tiny_llama, stacked, 3, 0.1)
    assert bool((doubt_B > 0).all())
    real_BT = stacked.inputs["attention_mask"].bool()
    assert not bool(moved_BTI[~real_BT].any())
    assert float(moved_BTI.abs().max()) == pytest.approx(0.3, rel=1e-5)
    assert not tiny_llama.get_input_embeddings()._forward_hooks


def test_with_ada_weights_a_task_weighs_the_unchanged_parts_of_all_before_it(course, make_adapter, tiny_llama):
    begin = make_adapter(tiny_llama, "begin", rank=3, targets=("q_proj", "down_proj"), seed=4)
    found = course("construct_vl", ada_weights=True, replay=0.5, attacks=1, settings={"start": {"upper": begin}})
    for layer in found["upper"].layers:
        start = begin.layers[layer].rank if layer in begin.layers else 0
        if layer not in {each for each in found["count"].layers if "q_proj" in each or "v_proj" in each}:
            assert torch.equal(found["count"].delta(layer), begin.delta(layer))
            continue
        upper, double, count = (found[name].layers[layer] for name in ("upper", "double", "count"))
        assert torch.equal(count.a_RI[: start + 2], upper.a_RI)
        assert torch.equal(count.a_RI[: start + 4], double.a_RI)
        if start:
            assert torch.equal(count.b_OR[:, :start], begin.layers[layer].b_OR)
        # b of a part in two models: the same columns up to one factor, which is not 1
        for part, (one, other) in {0: (double, count), 1: (double, count)}.items():
            columns = slice(start + 2 * part, start + 2 * part + 2)
            ratio = (other.b_OR[:, columns] / one.b_OR[:, columns]).flatten()
            assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
            assert 1e-4 < abs(float(ratio[0]) - 1) < 0.2
    with pytest.raises(LayerMismatch, match="does not begin with the one before"):
        own_parts(found, start=begin)


def test_replay_without_a_meaning_is_refused(course):
    with pytest.raises(lw.TrainingError, match="replay=-1"):
        course("construct_vl", replay=-1.0)


def test_adapters_that_are_no_prefixes_have_no_parts(course):
    with pytest.raises(LayerMismatch, match="of task 'double' does not begin with the one before"):
        own_parts(course("sequential"))
