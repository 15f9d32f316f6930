"""The entropy of predictions, against distributions written out."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss, with_own_answers
from loraweave.errors import InvalidTask

LABELS = ("yes", "no", "not a")
TASK = lw.Task([("a", "no"), ("bb", "yes")], instruction="judge", labels=LABELS)
FREE = lw.Task([("a", "ab"), ("bb", "b")], instruction="swap")


def entropy(logs, dim=0):
    return -(logs.exp() * logs).sum(dim=dim)


def test_with_labels_it_is_the_entropy_of_their_distribution(engine, tokenizer, candidate, likelihood):
    expected = []
    for text in ("a", "bb"):
        sums = torch.stack([likelihood(TASK, text, label).sum() for label in LABELS])
        expected.append(float(entropy(sums.log_softmax(dim=0))))
    losses, _ = ExampleLoss(engine, tokenizer, TASK, kind="entropy").scores([candidate])
    assert losses[0] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_without_labels_it_is_the_mean_entropy_where_the_target_is_predicted(engine, tokenizer, candidate, logs):
    expected = [float(entropy(logs(FREE, *pair)[0], dim=1).mean()) for pair in FREE.examples]
    losses, _ = ExampleLoss(engine, tokenizer, FREE, kind="entropy").scores([candidate])
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_with_labels_inputs_without_targets_give_what_any_target_gives(engine, tokenizer, candidate):
    unlabelled = ExampleLoss(engine, tokenizer, TASK, kind="entropy", inputs=["a", "bb"])
    assert unlabelled([candidate]) == ExampleLoss(engine, tokenizer, TASK, kind="entropy")([candidate])


def test_without_labels_inputs_have_the_answers_of_the_uniform_mixture(engine, tokenizer):
    task = with_own_answers(engine, tokenizer, FREE, ["cd", "e"])
    written = engine_answers(engine, tokenizer, [FREE.prompt("cd"), FREE.prompt("e")])
    assert task.examples == (("cd", written[0] or "."), ("e", written[1] or "."))
    assert not engine.active


def engine_answers(engine, tokenizer, prompts):
    whole = lw.Composer(engine.model, engine.pool, tokenizer=tokenizer)
    answers = []
    for prompt in prompts:
        ends = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]]
        mixture = dict.fromkeys("abc", 1 / 3)
        (text,) = whole.generate([prompt], mixture=mixture, max_new_tokens=16, do_sample=False, eos_token_id=ends)
        answers.append((text.strip(" ").splitlines() or [""])[0].strip())
    return answers


def test_only_entropy_takes_inputs_without_targets(engine, tokenizer):
    with pytest.raises(InvalidTask, match="'cross_entropy' needs targets"):
        ExampleLoss(engine, tokenizer, FREE, inputs=["a"])
    with pytest.raises(InvalidTask, match="at least one"):
        ExampleLoss(engine, tokenizer, FREE, kind="entropy", inputs=[])
