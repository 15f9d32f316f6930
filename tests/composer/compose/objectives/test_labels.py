"""The ranking of labels, against log-likelihoods written out label by label."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.errors import InvalidTask

LABELS = ("yes", "no", "not a")
TASK = lw.Task([("a", "no"), ("bb", "not a"), ("cc", "yes")], instruction="judge", labels=LABELS)


def summed(likelihood, text):
    return torch.stack([likelihood(TASK, text, label).sum() for label in LABELS])


def test_the_loss_is_minus_the_log_of_the_targets_share(engine, tokenizer, candidate, likelihood):
    expected = [-float(summed(likelihood, x).log_softmax(dim=0)[LABELS.index(y)]) for x, y in TASK.examples]
    objective = ExampleLoss(engine, tokenizer, TASK, kind="labels", l1=0.0)
    assert objective.scores([candidate])[0][0] == pytest.approx(expected, rel=1e-5)


def test_a_hit_is_an_example_whose_target_ranks_first(engine, tokenizer, candidate, likelihood):
    expected = [int(summed(likelihood, x).argmax()) == LABELS.index(y) for x, y in TASK.examples]
    objective = ExampleLoss(engine, tokenizer, TASK, kind="labels")
    assert objective.scores([candidate])[1][0].tolist() == expected


def test_a_prompt_is_read_once_for_all_labels(make_model, make_adapters, tokenizer, candidate):
    model = make_model("llama")
    objective = ExampleLoss(lw.Composer(model, make_adapters(model, "llama")), tokenizer, TASK, kind="labels")
    objective([candidate])
    read = []
    model.register_forward_pre_hook(lambda _, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True)
    objective.view([1])([candidate])
    prompt = len(tokenizer(TASK.prompt("bb"))["input_ids"])
    # " yes", "no" of " no", "t a" of " not a": the first space and "no" are common to several, and ends predict nothing
    assert read == [prompt + len(" yes") + len("no") + len("t a")]


def test_a_task_without_labels_is_refused(engine, tokenizer):
    with pytest.raises(InvalidTask, match=r"ranks the labels.*has none: give Task"):
        ExampleLoss(engine, tokenizer, lw.Task([("a", "no")]), kind="labels")


def test_a_target_that_is_no_label_is_refused():
    with pytest.raises(InvalidTask, match="target 'maybe', which is none of the labels"):
        lw.Task([("a", "maybe")], labels=LABELS)
