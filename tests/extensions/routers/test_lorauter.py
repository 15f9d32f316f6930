"""From a text to tasks and from these to adapters: the formula written out, and the table that a fit measures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, ScopeError, WeightingError
from loraweave.hub.embedders.hashing import Hashing

TASKS = {"fruit": ["red apple", "green apple"], "numbers": ["one two three", "four"], "places": ["paris in france"]}
LOSSES = {
    "fruit": {"a": 0.5, "b": 0.2, "c": 0.9},
    "numbers": {"a": 0.1, "b": 0.4, "c": 0.4},
    "places": {"a": 0.3, "b": 0.3, "c": 0.2},
}
TEXTS = ["an apple", "two and four", "is rome in france"]


def lorauter(pool, **options):
    return lw.router("lorauter", pool, **{"tasks": TASKS, "losses": LOSSES, "embedder": "hashing"} | options)


def expected(num_tasks, best, temperature):
    """w_NE by loops over texts, tasks and adapters."""
    embed = Hashing().embed
    found = np.zeros((len(TEXTS), 3))
    for n, text in enumerate(TEXTS):
        cosines = {}
        for task, prompts in TASKS.items():
            mean = embed(prompts).astype(np.float64).mean(axis=0)
            cosines[task] = float(embed([text])[0] @ mean / np.linalg.norm(mean))
        near = sorted(cosines, key=lambda task: -cosines[task])[:num_tasks]
        total = sum(math.exp(cosines[task] / temperature) for task in near)
        for task in near:
            for name in sorted(LOSSES[task], key=LOSSES[task].get)[:best]:
                found[n, "abc".index(name)] += math.exp(cosines[task] / temperature) / total / best
    return found


@pytest.mark.parametrize("settings", [(3, 1, 0.1), (1, 1, 0.1), (2, 2, 0.3), (7, 3, 1.0)])
def test_weights_are_those_of_the_nearest_tasks_best_adapters(pool, settings):
    num_tasks, best, temperature = settings
    found = lorauter(pool, num_tasks=num_tasks, best=best, temperature=temperature).of_texts(TEXTS)
    assert np.allclose(found.numpy(), expected(*settings), atol=1e-6)
    assert torch.allclose(found.sum(dim=1), torch.ones(3))


def test_of_one_task_and_its_best_adapter_it_is_that_adapter(engine, model, pool, tokenizer):
    router = lorauter(pool, num_tasks=1, tasks={"fruit": TASKS["fruit"]}, losses={"fruit": LOSSES["fruit"]})
    ids_BT = torch.tensor([tokenizer("an apple")["input_ids"]])
    with torch.no_grad():
        with engine.activate(router):
            found = model(ids_BT).logits
        with engine.activate({"b": 1.0}):
            assert torch.allclose(found, model(ids_BT).logits, atol=1e-5)


def test_a_fit_measures_every_adapter_on_every_task(engine, model, pool, tokenizer):
    tasks = {"fruit": lw.Task([("red", "apple"), ("yellow one", "pear")], instruction="a fruit"), "sum": [("1 2", "3")]}
    router = lw.router("lorauter", pool, embedder="hashing").fit(engine, tasks, progress=False)
    for name, task in tasks.items():
        task = task if isinstance(task, lw.Task) else lw.Task(task)
        for expert in pool.names:
            losses = []
            for text, target in task.examples:
                prompt = tokenizer(task.prompt(text))["input_ids"]
                answer = tokenizer(f" {target}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
                with torch.no_grad(), engine.activate({expert: 1.0}):
                    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))))
            assert router.report["losses"][name][expert] == pytest.approx(np.mean(losses), abs=1e-5)
    prompts = {name: (t if isinstance(t, lw.Task) else lw.Task(t)) for name, t in tasks.items()}
    again = lorauter(
        pool,
        tasks={name: [task.prompt(text) for text, _ in task.examples] for name, task in prompts.items()},
        losses=router.report["losses"],
    )
    assert torch.equal(again.of_texts(TEXTS), router.of_texts(TEXTS))


def test_saved_it_gives_the_same_and_says_what_was_measured(pool, tmp_path):
    made = lorauter(pool)
    made.save_pretrained(tmp_path / "router")
    again = lw.router(tmp_path / "router")
    assert torch.equal(again.of_texts(TEXTS), made.of_texts(TEXTS))
    assert again.report == {"losses": LOSSES}


def test_a_table_may_be_of_a_larger_pool(pool):
    fewer = lorauter(pool.subset(["c", "a"]), num_tasks=1).of_texts(TEXTS)
    # fruit was answered best by b, and then by a
    assert fewer.tolist() == [[0, 1], [0, 1], [1, 0]]


def test_an_adapter_without_a_finite_loss_is_chosen_by_no_task(pool):
    losses = {"fruit": {"a": math.nan, "b": math.inf, "c": 5.0}}
    found = lorauter(pool, tasks={"fruit": TASKS["fruit"]}, losses=losses).of_texts(TEXTS)
    assert torch.equal(found, torch.eye(3)[[2, 2, 2]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"losses": None}, WeightingError, "have only one of them"),
        ({"tasks": {"fruit": []}, "losses": {"fruit": LOSSES["fruit"]}}, WeightingError, "'fruit'.*no prompts"),
        ({"losses": LOSSES | {"fruit": {"a": 1.0}}}, WeightingError, "the losses of task 'fruit' lack 'b', 'c'"),
        ({"losses": LOSSES | {"fruit": dict.fromkeys("abc", math.nan)}}, WeightingError, "no expert has a finite loss"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(pool, options, error, message):
    with pytest.raises(error, match=message):
        lorauter(pool, **options)


def test_without_a_fit_or_a_tokenizer_it_says_what_is_missing(model, pool, tmp_path):
    unfitted = lw.router("lorauter", pool, embedder="hashing")
    with pytest.raises(WeightingError, match="fit"):
        unfitted.of_texts(TEXTS)
    with pytest.raises(CompositionError, match="tokenizer="):
        unfitted.fit(Composer(model, pool), {"fruit": [("x", "y")]})
    with pytest.raises(ScopeError, match="fit"):
        lorauter(pool).remove_expert("a")
