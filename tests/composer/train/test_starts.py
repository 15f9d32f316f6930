"""Trainings that begin from a given adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraweave.composer.model.batches import batch, encode, token_losses
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.passes import LoraJobs
from loraweave.composer.train.settings import LoraSettings
from loraweave.errors import AdapterUnsupported, BaseModelMismatch, LayerMismatch, TrainingError, UnknownName
from loraweave.hub.base import fingerprint

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2")],
}
LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.self_attn.v_proj": (8, 16)}


def train(model, tokenizer, tasks=TASKS, **options):
    settings = {"rank": 3, "steps": 5, "batch_size": 2, "lr": 1e-2, "progress": False}
    return train_adapters(model, tokenizer, tasks, **{**settings, **options})


@pytest.fixture
def begin(tiny_llama, make_adapter):
    """An adapter of other layers and another rank than the jobs beside it."""
    return make_adapter(tiny_llama, "begin", rank=5, targets=("q_proj", "down_proj"), seed=4)


def equal(left, right):
    return list(left) == list(right) and all(
        torch.equal(left[layer].a_RI, right[layer].a_RI) and torch.equal(left[layer].b_OR, right[layer].b_OR)
        for layer in left
    )


def test_before_the_first_step_a_job_is_the_adapter_that_it_starts_from_to_the_bit(tiny_llama, begin):
    jobs = LoraJobs(tiny_llama, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    assert equal(jobs.layers_of("old"), begin.layers)
    assert {layer: factors.rank for layer, factors in jobs.layers_of("new").items()} == dict.fromkeys(LAYERS, 3)


def test_the_forward_of_a_started_job_is_that_of_the_adapters_dense_update(make_model, begin, with_dense_update):
    model = make_model("llama", dtype=torch.float64)
    ids = torch.tensor([[5, 9, 30, 41], [7, 7, 12, 3]])
    jobs = LoraJobs(model, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    with torch.no_grad(), jobs:
        found = model(input_ids=ids).logits
    expected = with_dense_update("llama", [begin], [1.0], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(found[1], expected(input_ids=ids).logits[1], atol=1e-9)
        assert torch.allclose(found[0], model(input_ids=ids).logits[0], atol=1e-12)


def test_jobs_of_other_layers_and_ranks_get_gradients_in_their_own_factors_alone(tiny_llama, tokenizer, begin):
    jobs = LoraJobs(tiny_llama, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    rows = encode(tiny_llama, tokenizer, ["a", "b", "c", "d"], ["A", "B", "C", "D"])
    new, old = jobs.members
    with jobs:
        token_losses(tiny_llama, batch(tiny_llama, tokenizer, rows))[2:].sum().backward()
    assert all(parameter.grad.any() for parameter in old.parameters())
    assert not any(parameter.grad.any() for parameter in new.parameters())
    assert [len(a_RI) for a_RI, _ in new.factors.values()] == [3, 3]
    assert list(old.layers) == list(begin.layers)


def test_a_started_job_comes_out_the_same_alone_and_among_others(tiny_llama, tokenizer, begin):
    together = train(tiny_llama, tokenizer, start={"double": begin})
    alone = train(tiny_llama, tokenizer, {"double": TASKS["double"]}, start={"double": begin})
    unstarted = train(tiny_llama, tokenizer, {"upper": TASKS["upper"]})
    for name, expected in (("double", alone), ("upper", unstarted)):
        assert list(together[name].layers) == list(expected[name].layers)
        for layer, factors in expected[name].layers.items():
            assert torch.allclose(together[name].layers[layer].a_RI, factors.a_RI, atol=1e-5)
            assert torch.allclose(together[name].layers[layer].b_OR, factors.b_OR, atol=1e-5)


def test_a_started_adapter_keeps_layers_and_ranks_and_says_what_it_began_from(tiny_llama, tokenizer, begin):
    found = train(tiny_llama, tokenizer, start={"double": begin})["double"]
    assert [(layer, f.rank) for layer, f in found.layers.items()] == [(layer, 5) for layer in begin.layers]
    assert found.card["recipe"]["start"] == {"hash": begin.hash, "name": "begin"}
    assert not equal(found.layers, begin.layers)


def test_folds_of_one_task_are_jobs_of_one_batch(tiny_llama, tokenizer, begin, watch_steps):
    steps = watch_steps()
    folds = {f"fold-{index}": TASKS["upper"][:index] + TASKS["upper"][index + 2 :] for index in range(3)}
    found = train(tiny_llama, tokenizer, folds, start=dict.fromkeys(folds, begin), batch_size=3, steps=2)
    assert [(len(rows), counts) for rows, counts in steps] == [(9, [3, 3, 3])] * 2
    assert len({adapter.hash for adapter in found.values()}) == 3


def test_the_checkpoint_of_one_start_is_not_that_of_another(tiny_llama, tokenizer, begin, make_adapter, tmp_path):
    other = make_adapter(tiny_llama, "begin", rank=5, targets=("q_proj", "down_proj"), seed=5)
    first, second = (train(tiny_llama, tokenizer, start={"count": a}, checkpoint=tmp_path)["count"] for a in (begin, other))
    again = train(tiny_llama, tokenizer, start={"count": begin}, checkpoint=tmp_path)["count"]
    assert first.hash == again.hash != second.hash


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, [1.0, 0.853553, 0.5, 0.146447]), (1, [1.0, 1.0, 0.75, 0.25]), (9, [0.5, 1.0, 1.0, 0.5])]
)
def test_warm_up_takes_as_many_steps_as_asked_and_at_most_half(warmup, expected):
    recipe = LoraSettings(steps=4, lr=1.0, warmup=warmup)
    assert [recipe.rate(step) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_a_start_that_does_not_fit_is_refused_before_the_first_step(tiny_llama, make_model, tokenizer, make_adapter, begin):
    other = make_model("llama", hidden_size=8)
    gained = make_adapter(tiny_llama, "gained", gain=True)
    rows = make_adapter(tiny_llama, "rows", targets=("q_proj",))
    words = {"model.embed_tokens": replace(next(iter(rows.layers.values())), kind="embedding", a_RI=torch.randn(3, 61))}
    cases = [
        ({"uper": begin}, UnknownName, "'uper', which is not a task; the tasks are upper"),
        ({"upper": replace(begin, fingerprint=fingerprint(other))}, BaseModelMismatch, "'begin' was made for another"),
        ({"upper": make_adapter(other, "small")}, LayerMismatch, "small"),
        ({"upper": gained}, AdapterUnsupported, "'gained': layer .* has gain_O"),
        ({"upper": replace(rows, layers=words)}, AdapterUnsupported, "is of kind 'embedding'"),
    ]
    for start, error, message in cases:
        with pytest.raises(error, match=message):
            train(tiny_llama, tokenizer, start=start)
    with pytest.raises(TrainingError, match="got warmup=-1"):
        train(tiny_llama, tokenizer, warmup=-1)
