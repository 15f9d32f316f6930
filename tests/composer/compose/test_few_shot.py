"""The ways of compose() that show the examples: the base in context, and a LoRA trained under demonstrations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.composer.compose import refine
from loraweave.composer.compose.learning import BEGUN, FEW_SHOT, ORDERS
from loraweave.errors import InvalidTask, WeightingError

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD")]


@pytest.fixture
def task():
    return lw.Task(EXAMPLES, instruction="swap")


# what stands before each example in turn: the others on its longer side, the outer first
BEFORE = [[3, 2, 1], [3, 2], [0, 1], [0, 1, 2]]


@pytest.fixture
def compose(compose_on):
    return partial(compose_on, method="few_shot", steps=3)


def test_in_context_is_the_base_under_the_other_examples(compose_on, tiny_llama, tokenizer, task):
    found = compose_on(method="in_context")
    assert found.is_base
    assert found.task.demonstrations == task.examples
    expected = []
    for (text, target), before in zip(EXAMPLES, BEFORE, strict=True):
        prompt = "".join(f"swap\nInput: {x}\nOutput: {y}\n\n" for x, y in map(EXAMPLES.__getitem__, before))
        ids = tokenizer(f"{prompt}swap\nInput: {text}\nOutput:")["input_ids"]
        answer = tokenizer(f" {target}\n", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = tiny_llama(input_ids=torch.tensor([ids + answer])).logits[0].double().log_softmax(dim=1)
        expected.append(-np.mean([float(logs[len(ids) - 1 + k, token]) for k, token in enumerate(answer)]))
    assert found.report["in_context"].loss == pytest.approx(np.mean(expected), rel=1e-4)
    everyone = [
        replace(found, task=replace(task, demonstrations=[x for x in EXAMPLES if x != own])).losses([own])
        for own in EXAMPLES
    ]
    assert found.losses() == pytest.approx(np.concatenate(everyone), rel=1e-4)


def test_few_shot_is_the_training_under_demonstrations(compose, tiny_llama, tokenizer, task):
    found = compose(folds=0, seed=5)
    shown = lw.Task(EXAMPLES, instruction="swap", demonstrations=True)
    alone = lw.train_adapters(
        tiny_llama,
        tokenizer,
        {"all": shown},
        steps=3,
        lr=FEW_SHOT.lr,
        batch_size=FEW_SHOT.batch_size,
        warmup=0,
        seed=5,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        progress=False,
    )["all"]
    assert found.adapter.layers.keys() == alone.layers.keys()
    for layer, factors in alone.layers.items():
        torch.testing.assert_close(found.adapter.layers[layer].b_OR, factors.b_OR, rtol=1e-4, atol=1e-6)
    assert found.task == lw.Task(EXAMPLES, instruction="swap", demonstrations=True, orders=ORDERS)
    assert "an adapter trained on the examples" in repr(found)
    assert found.tuned_steps == 3


@pytest.fixture
def reader(tiny_llama, make_adapter):
    """An adapter that is tagged as one that reads demonstrations."""
    return replace(make_adapter(tiny_llama, "reader", seed=7), card={"tags": ["in-context"]})


@pytest.fixture
def hub(tmp_path, pool, reader):
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in [*pool.adapters.values(), reader]:
            hub.add(adapter)
        yield hub


def test_few_shot_begins_as_the_adapter_of_the_hub_that_reads_demonstrations(compose, hub, reader, tiny_llama, tokenizer):
    found = compose(hub, folds=0, seed=5)
    shown = lw.Task(EXAMPLES, instruction="swap", demonstrations=True)
    settings = {"steps": 3, "lr": BEGUN.lr, "batch_size": BEGUN.batch_size, "warmup": 0, "seed": 5, "progress": False}
    alone = lw.train_adapters(tiny_llama, tokenizer, {"all": shown}, start={"all": reader}, **settings)["all"]
    assert found.adapter.layers.keys() == reader.layers.keys()
    for layer, factors in alone.layers.items():
        torch.testing.assert_close(found.adapter.layers[layer].b_OR, factors.b_OR, rtol=1e-4, atol=1e-6)
    assert "few_shot began as the hub's 'reader'" in found.report.reason
    assert [parent["hash"] for parent in found.parents] == [reader.hash]


def test_the_adapter_that_reads_demonstrations_is_no_candidate_beside_others(compose_on, hub, pool):
    found = compose_on(hub, method="uniform", k=4)
    assert sorted(found.mean_weights) == sorted(pool.names)
    for name in pool.names:
        hub.remove(name)
    assert list(compose_on(hub, method="uniform", k=4).mean_weights) == ["reader"]


def test_both_members_of_auto_know_where_they_come_from(compose_on, hub, reader, pool):
    found = compose_on(hub, budget=40)
    alone, losses = replace(found, members={}, stored=reader), []
    for example, before in zip(EXAMPLES, BEFORE, strict=True):
        shown = lw.Task(EXAMPLES, instruction="swap", demonstrations=[EXAMPLES[place] for place in before])
        losses += replace(alone, task=shown).losses([example])
    assert found.report["in_context_adapter"].loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert [parent["name"] for parent in found.members["few_shot"].parents] == ["reader"]
    assert set(found.members["gradient"].mean_weights) <= set(pool.names)


def test_a_folds_training_never_meets_what_it_is_measured_on(compose, monkeypatch):
    trained = {}
    original = refine.train_adapters

    def spy(model, tokenizer, jobs, **settings):
        trained.update(jobs)
        return original(model, tokenizer, jobs, **settings)

    monkeypatch.setattr(refine, "train_adapters", spy)
    compose(folds=2)
    halves = [set(trained[f"fold-{number}"].examples) for number in range(2)]
    assert halves[0] | halves[1] == set(EXAMPLES)
    assert not halves[0] & halves[1]
    for name in ("fold-0", "fold-1", "all"):
        assert trained[name].demonstrations == trained[name].examples


def test_a_composition_keeps_its_demonstrations(compose, tiny_llama, tokenizer, tmp_path):
    found = compose(folds=0)
    found.save_pretrained(tmp_path / "kept")
    read = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert read.task == found.task
    assert read.losses() == pytest.approx(found.losses(), rel=1e-4)
    assert read.predict(["b", "x"]) == found.predict(["b", "x"])


def test_an_exported_adapter_says_how_it_is_asked(compose, tmp_path):
    report = compose(folds=0).export(tmp_path / "out")
    prompts = lw.Adapter.from_pretrained(report.folder).card["prompts"]
    for start, prompt in zip((0, 1, 2), prompts, strict=True):
        turned = EXAMPLES[start:] + EXAMPLES[:start]
        shown = "".join(f"swap\nInput: {text}\nOutput: {answer}\n\n" for text, answer in turned)
        assert prompt == f"{shown}swap\nInput: {{input}}\nOutput:"


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": -1.0}, {"rank": 4}])
def test_options_out_of_range_are_refused(compose, options):
    with pytest.raises(WeightingError, match="method 'few_shot'"):
        compose(**options)


def test_one_example_cannot_be_held_out(compose_on):
    with pytest.raises(InvalidTask, match="one example"):
        compose_on(task=lw.Task([("a", "b")]), method="few_shot")
