"""A prompt distilled into an adapter: trained on the prompted base's answers, and the closer to them the stronger it is."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.errors import InvalidTask
from loraweave.extensions.transfer import distil_prompt, prompts

INPUTS = ["a b", "b c a", "c", "d e", "f a", "b b"]
SETTINGS = {"rank": 4, "steps": 25, "lr": 2e-2, "max_new_tokens": 4, "seed": 3, "progress": False}


def test_it_is_the_adapter_of_the_prompted_answers_under_the_bare_prompts(model, tokenizer):
    teacher = lw.Task([], instruction="x y", demonstrations=[("d", "e")])
    found = distil_prompt(model, tokenizer, teacher, INPUTS, name="terse", **SETTINGS)
    answers = scoring.predict(model, tokenizer, teacher, INPUTS, max_new_tokens=4)
    rows = [(text, answer) for text, answer in zip(INPUTS, answers, strict=True) if answer.strip()]
    bare = lw.Task(rows, template="Input: {input}\nOutput:")
    options = {key: value for key, value in SETTINGS.items() if key != "max_new_tokens"}
    assert found.hash == lw.train_adapters(model, tokenizer, {"terse": bare}, **options)["terse"].hash
    assert found.name == "terse"
    assert found.card["description"] == "Answers as under the prompt: x y"


def test_the_stronger_it_is_the_likelier_are_the_prompted_answers(model, tokenizer):
    teacher = lw.Task([], instruction="x y z", labels=["x", "y z"])
    # of a random model, the one that it would not give without the prompt
    found = distil_prompt(model, tokenizer, teacher, INPUTS, **SETTINGS)
    answers = scoring.predict(model, tokenizer, teacher, INPUTS)
    bare = lw.Task([], template="Input: {input}\nOutput:")
    losses = []
    with torch.no_grad():
        for weight in (0.0, 0.5, 1.0):
            with Composer(model, [found], tokenizer=tokenizer).activate({found.name: weight}):
                losses.append(sum(scoring.losses(model, tokenizer, bare, list(zip(INPUTS, answers, strict=True)))))
        base = sum(scoring.losses(model, tokenizer, bare, list(zip(INPUTS, answers, strict=True))))
    assert losses[0] == base
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_answer_as_one_process_does(make_model, tokenizer, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = lw.load_base(tmp_path)
    monkeypatch.setattr(prompts, "BATCH_SIZE", 2)
    # where a prompt ends with its input, each has an answer of its own
    teacher = lw.Task([], instruction="x y", template="{instruction} {input}")
    settings = {**SETTINGS, "steps": 2}
    one = distil_prompt(model, tokenizer, teacher, INPUTS, **settings)
    assert distil_prompt(model, tokenizer, teacher, INPUTS, n_jobs=2, **settings).hash == one.hash


def test_a_prompt_that_says_nothing_is_refused(model, tokenizer):
    with pytest.raises(InvalidTask, match="of 6 inputs, the first is asked alike"):
        distil_prompt(model, tokenizer, lw.Task([], template="{input}"), INPUTS, **SETTINGS)
    with pytest.raises(InvalidTask, match="of 0 inputs"):
        distil_prompt(model, tokenizer, lw.Task([], instruction="x"), [], **SETTINGS)
