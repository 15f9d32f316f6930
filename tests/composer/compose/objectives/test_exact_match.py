"""The share of wrong answers, against generation and ranking."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.scoring import rank
from loraweave.errors import WeightingError

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
