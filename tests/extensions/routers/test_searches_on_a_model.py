"""Searches by gradients on a model in float64, against its weights written out and every adapter alone."""

from __future__ import annotations

import pytest
import torch
from written_out import adapters as adapters
from written_out import model as model
from written_out import written_out as written_out

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.extensions.routers.routers.adamerging import Adamerging
from loraweave.extensions.routers.routers.first_order import FirstOrder

NAMES = ("a", "b", "c")


def test_adamerging_follows_the_entropy_over_labels_of_a_model_whose_weights_are_written_out(
    model, adapters, tokenizer, written_out
):
    labels, inputs = ["ab", "c", "DD"], ["a", "cc", "e f", "b"]
    task = lw.Task([("a", "ab"), ("cc", "c")], labels=labels)
    entropy = ExampleLoss(lw.Composer(model, adapters), tokenizer, task, kind=Adamerging.loss, inputs=inputs, l1=0.0)
    layers = list(entropy.engine.target_layers)
    result = Adamerging(NAMES, budget=8, layers=layers, lr=0.1).solve(entropy)
    prompts = [task.prompt(text) for text in inputs for _ in labels]
    dense = written_out(prompts, labels * len(inputs))
    w_LE = torch.full((len(layers), 3), 0.3, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([w_LE], lr=0.1), []
    for _ in range(4):
        adam.zero_grad()
        logs_NR = (-dense(w_LE, layers).sum(dim=1)).view(len(inputs), len(labels)).log_softmax(dim=1)
        loss = -(logs_NR.exp() * logs_NR).sum(dim=1).mean()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.loss < result.losses[0]


def test_a_quadratic_model_of_the_loss_leads_below_every_adapter_alone(model, adapters, tokenizer):
    examples = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]
    loss = ExampleLoss(lw.Composer(model, adapters), tokenizer, lw.Task(examples, instruction="swap"), l1=0.0)
    singles = loss([lw.MixtureWeights.of({name: 1.0}, NAMES) for name in NAMES])
    assert FirstOrder(NAMES).solve(loss).loss < min(singles)
