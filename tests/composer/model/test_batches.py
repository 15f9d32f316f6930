"""Losses of targets: against a plain forward pass of each row alone, with the formula written out."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.model.batches import batch, encode, mean_losses, token_losses, token_scores
from loraweave.errors import InvalidTask

PROMPTS = ["add 1 2:", "a much longer prompt, no?", "x"]
TARGETS = ["3", "some words", "yy"]


def alone(model, tokenizer, prompt, target):
    """Log-likelihoods of the target's tokens, one unpadded row, straight from the definition."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    target_ids = tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([prompt_ids + target_ids])).logits[0].double()
    logs = logits.log_softmax(dim=1)
    return [float(logs[len(prompt_ids) - 1 + k, token]) for k, token in enumerate(target_ids)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_losses_of_a_padded_batch_are_those_of_each_row_alone(kind, make_model, tokenizer):
    model = make_model(kind)
    losses = token_losses(model, batch(model, tokenizer, encode(model, tokenizer, PROMPTS, TARGETS)))
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        expected = alone(model, tokenizer, prompt, target)
        assert losses[row, -len(expected) :].tolist() == pytest.approx([-value for value in expected], abs=2e-4)
        assert not losses[row, : -len(expected)].any()


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_is_scored_through_its_labels(kind, make_model, tokenizer):
    model = make_model(kind)
    prepared = batch(model, tokenizer, encode(model, tokenizer, PROMPTS, TARGETS))
    chosen = prepared.rows([0, 2])
    assert chosen.inputs["input_ids"].shape[1] == len(PROMPTS[0])
    losses, losses_of_chosen = mean_losses(model, prepared), mean_losses(model, chosen)
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        labels = torch.tensor([tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]])
        expected = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]), labels=labels).loss
        assert float(losses[row]) == pytest.approx(float(expected), abs=2e-4)
        if row != 1:
            assert float(losses_of_chosen[row // 2]) == pytest.approx(float(expected), abs=2e-4)


@torch.no_grad()
def test_a_hit_is_a_target_token_that_is_the_most_likely_one(tiny_llama, tokenizer):
    prepared = batch(tiny_llama, tokenizer, encode(tiny_llama, tokenizer, PROMPTS, TARGETS))
    _, hits = token_scores(tiny_llama, prepared)
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        prompt_ids = tokenizer(prompt)["input_ids"]
        target_ids = tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]
        best = tiny_llama(input_ids=torch.tensor([prompt_ids + target_ids])).logits[0].argmax(dim=1)
        expected = [int(best[len(prompt_ids) - 1 + k]) == token for k, token in enumerate(target_ids)]
        assert hits[row, -len(expected) :].tolist() == expected


def test_a_tiled_batch_repeats_all_rows_in_their_order(tiny_llama, tokenizer):
    prepared = batch(tiny_llama, tokenizer, encode(tiny_llama, tokenizer, PROMPTS, TARGETS))
    tiled = prepared.tile(2)
    assert torch.equal(tiled.targets_BK[3:], prepared.targets_BK)
    assert torch.equal(tiled.inputs["input_ids"][:3], prepared.inputs["input_ids"])


@pytest.mark.parametrize("target", ["", "   "])
def test_an_empty_target_is_refused_with_its_row(target, tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 2 .*empty target"):
        encode(tiny_llama, tokenizer, ["a", "b"], ["c", target])


def test_an_empty_prompt_is_refused_with_its_row(tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 2 .*empty prompt"):
        encode(tiny_llama, tokenizer, ["a", ""], ["c", "d"])


def test_a_row_longer_than_the_context_is_refused_with_both_lengths(tiny_gpt2, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 1 has 73 tokens.*context is 64"):
        encode(tiny_gpt2, tokenizer, ["a" * 70], ["b"])
