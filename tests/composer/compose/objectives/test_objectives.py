"""The ranking of labels, against log-likelihoods written out label by label."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.scoring import rank
from loraweave.errors import InvalidTask, WeightingError

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
    with pytest.raises(InvalidTask, match="target 'maybe', which is not one of the labels"):
        lw.Task([("a", "maybe")], labels=LABELS)


MIXTURE = {"a": 0.2, "b": -0.1, "c": 0.3}
INPUTS = ["a", "bb", "c c"]


@torch.no_grad()
def greedy(engine, tokenizer, prompt):
    """The three tokens that greedy decoding writes first."""
    model = engine.model
    with engine.activate(MIXTURE):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        if model.config.is_encoder_decoder:
            written = torch.tensor([[model.config.decoder_start_token_id]])
            for _ in range(3):
                logits = model(input_ids=ids, decoder_input_ids=written, use_cache=False).logits
                written = torch.cat([written, logits[:, -1:].argmax(dim=2)], dim=1)
            return written[0, 1:].tolist()
        for _ in range(3):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=2)], dim=1)
    return ids[0, -3:].tolist()


def test_an_example_counts_unless_greedy_decoding_writes_its_target(engine, tokenizer, candidate, monkeypatch):
    task = lw.Task([(text, "xy") for text in INPUTS])
    written = [greedy(engine, tokenizer, task.prompt(text)) for text in INPUTS]
    targets = [written[0], [*written[1][:2], (written[1][2] + 1) % 58], written[2]]
    monkeypatch.setattr("loraweave.composer.compose.examples.encode", encoded_as(targets))
    objective = ExampleLoss(engine, tokenizer, task, kind="exact_match", l1=0.0)
    losses, hits = objective.scores([candidate])
    assert losses.tolist() == [[0.0, 1.0, 0.0]]
    assert hits.tolist() == [[True, False, True]]
    assert objective([candidate]) == pytest.approx([1 / 3])


def encoded_as(targets):
    from loraweave.composer.model.batches import EncodedRow

    def encode(model, tokenizer, prompts, _, ends):
        pairs = zip(tokenizer(list(prompts))["input_ids"], targets, strict=True)
        return [EncodedRow(tuple(prompt), tuple(target)) for prompt, target in pairs]

    return encode


def test_with_labels_an_example_counts_unless_its_target_ranks_first(engine, tokenizer, candidate):
    labels = ("yes", "no", "not a")
    task = lw.Task([(text, label) for text in INPUTS for label in labels], labels=labels)
    with torch.no_grad(), engine.activate(MIXTURE):
        best = rank(engine.model, tokenizer, [task.prompt(text) for text, _ in task.examples], labels)
    expected = [float(found != label) for found, (_, label) in zip(best, task.examples, strict=True)]
    losses, _ = ExampleLoss(engine, tokenizer, task, kind="exact_match").scores([candidate])
    assert losses[0].tolist() == expected
    assert sum(expected) == 6


def test_there_are_no_gradients(engine, tokenizer, candidate):
    objective = ExampleLoss(engine, tokenizer, lw.Task([("a", "b")]), kind="exact_match")
    with pytest.raises(WeightingError, match="no gradients of objective ExactMatch"):
        objective.gradients([candidate])
