"""A table of how well each expert alone answers each task."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.errors import AlreadyActive, CompositionError, InvalidTask
from loraweave.hub.pool import ExpertPool

TASKS = {
    "count": lw.Task([(f"{n} {n}", str(n)) for n in range(7)]),
    "words": lw.Task([("red", "apple"), ("a long yellow one", "pear")], instruction="a fruit"),
}


@pytest.fixture(params=["llama", "t5"])
def engine(request, make_model, make_adapters, tokenizer):
    model = make_model(request.param)
    return Composer(model, ExpertPool(make_adapters(model, request.param)), tokenizer=tokenizer)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_it_is_the_mean_of_each_examples_loss_under_that_expert(engine, tokenizer, monkeypatch, max_rows):
    monkeypatch.setattr("loraweave.composer.explain.worth.MAX_ROWS", max_rows)
    table = engine.expert_losses(TASKS, progress=False)
    assert list(table) == list(TASKS)
    for name, task in TASKS.items():
        for expert in engine.pool.names:
            with engine.activate({expert: 1.0}):
                losses = [scoring.losses(engine.model, tokenizer, task, [example])[0] for example in task.examples]
            assert table[name][expert] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_the_model_is_as_it_was(engine):
    engine.model.train()
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.expert_losses({"words": TASKS["words"]}, progress=False)
    assert engine.model.training
    assert all(parameter.requires_grad for parameter in engine.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())


def test_what_cannot_be_measured_is_refused(engine):
    with pytest.raises(CompositionError, match="tokenizer="):
        Composer(engine.model, engine.pool).expert_losses(TASKS)
    with engine.fused({"a": 1.0}), pytest.raises(AlreadyActive, match="measure experts"):
        engine.expert_losses(TASKS)
    with pytest.raises(InvalidTask, match="a task without examples, 'none'"):
        engine.expert_losses({"none": lw.Task([])})
