"""The mean loss of the target's tokens, against log-likelihoods written out row by row."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss

TASK = lw.Task([("a", "ab"), ("bb", "b"), ("cc", "dCcc")], instruction="swap")


def test_the_loss_is_the_mean_over_examples_of_the_mean_over_tokens(engine, tokenizer, candidate, likelihood):
    expected = [-float(likelihood(TASK, *pair).mean()) for pair in TASK.examples]
    objective = ExampleLoss(engine, tokenizer, TASK, l1=0.0)
    assert objective.scores([candidate])[0][0] == pytest.approx(expected, rel=1e-6)
    assert objective([candidate]) == pytest.approx([sum(expected) / 3], rel=1e-6)
