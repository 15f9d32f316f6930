"""Rows with a teacher's predictions: the loss is the divergence written out, and plain rows keep theirs."""

import pytest
import torch

from loraweave.composer.model.batches import IGNORED, EncodedRow, batch, target_logits, token_losses
from loraweave.composer.train.jobs import row_losses
from loraweave.extensions.transfer import old_answers
from loraweave.extensions.transfer.old_answers import taught_by

ROWS = [EncodedRow((5, 9, 3), (17, 30, 4, 1)), EncodedRow((8, 8, 4, 12, 3), (7, 1)), EncodedRow((6,), (2, 40, 1))]


def written_out(teacher, model, tokenizer, likeliest):
    """Row by row and token by token, the teacher's likeliest tokens apart and all others as one."""
    found = []
    for row in ROWS:
        stacked = batch(model, tokenizer, [row])
        own = []
        for p, q in zip(*(target_logits(each, stacked)[0].softmax(dim=-1) for each in (teacher, model)), strict=True):
            named = p.argsort(descending=True)[:likeliest]
            shares = [(p[place], q[place]) for place in named]
            if likeliest < len(p):
                shares.append((1 - p[named].sum(), 1 - q[named].sum()))
            own.append(sum(a * (a / b).log() for a, b in shares))
        found.append(torch.stack(own))
    return found


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("likeliest", [64, 5])
def test_the_loss_and_its_gradient_are_the_divergence_written_out(make_model, tokenizer, monkeypatch, kind, likeliest):
    teacher, model = make_model(kind), make_model(kind)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    monkeypatch.setattr(old_answers, "LIKELIEST", likeliest)
    rows = taught_by(teacher, tokenizer, ROWS)
    assert [(row.prompt, row.target) for row in rows] == [(row.prompt, row.target) for row in ROWS]
    expected = written_out(teacher, model, tokenizer, likeliest)
    stacked = batch(model, tokenizer, rows)
    losses_BK = row_losses(model, rows, stacked)
    assert (losses_BK[stacked.targets_BK == IGNORED] == 0).all()
    for losses_K, targets_K, own in zip(losses_BK, stacked.targets_BK, expected, strict=True):
        torch.testing.assert_close(losses_K[targets_K != IGNORED], own, atol=1e-5, rtol=1e-4)
    assert losses_BK.sum() > 0.1
    parameters = [value for value in model.parameters() if value.requires_grad]
    ours = torch.autograd.grad(losses_BK.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sum(own.sum() for own in expected), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_model_has_nothing_to_learn_from_itself(make_model, tokenizer):
    model = make_model("llama")
    rows = taught_by(model, tokenizer, ROWS)
    assert row_losses(model, rows, batch(model, tokenizer, rows)).abs().max() < 1e-6


def test_rows_that_are_not_all_taught_have_the_likelihood_of_their_targets(make_model, tokenizer):
    teacher, model = make_model("llama"), make_model("gpt2")
    rows = [*taught_by(teacher, tokenizer, ROWS[:2]), ROWS[2]]
    stacked = batch(model, tokenizer, rows)
    assert torch.equal(row_losses(model, rows, stacked), token_losses(model, stacked))
