"""The loss of each expert alone on the examples of tasks."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.model import scoring
from loraweave.errors import AlreadyActive, CompositionError, InvalidTask
from loraweave.extensions.routers import expert_losses

TASKS = {
    "count": lw.Task([(f"{n} {n}", str(n)) for n in range(7)]),
    "words": lw.Task([("red", "apple"), ("a long yellow one", "pear")], instruction="a fruit"),
}


@pytest.fixture(params=["llama", "t5"])
def either(request, make_model, make_adapters, tokenizer):
    model = make_model(request.param)
    return lw.Composer(model, lw.ExpertPool(make_adapters(model, request.param)), tokenizer=tokenizer)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_an_experts_loss_is_the_mean_of_each_examples_loss_under_it(either, tokenizer, monkeypatch, max_rows):
    monkeypatch.setattr("loraweave.extensions.routers.routers.lorauter.MAX_ROWS", max_rows)
    table = expert_losses(either, TASKS, progress=False)
    assert list(table) == list(TASKS)
    for name, task in TASKS.items():
        for expert in either.pool.names:
            with either.activate({expert: 1.0}):
                losses = [scoring.losses(either.model, tokenizer, task, [example])[0] for example in task.examples]
            assert table[name][expert] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_measuring_leaves_the_model_as_it_was(either):
    either.model.train()
    before = {name: value.clone() for name, value in either.model.state_dict().items()}
    expert_losses(either, {"words": TASKS["words"]}, progress=False)
    assert either.model.training
    assert all(parameter.requires_grad for parameter in either.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in either.model.state_dict().items())


def test_what_cannot_be_measured_is_refused(either):
    with pytest.raises(CompositionError, match="tokenizer="):
        expert_losses(lw.Composer(either.model, either.pool), TASKS)
    with either.fused({"a": 1.0}), pytest.raises(AlreadyActive, match="while a mixture is fused into the weights"):
        expert_losses(either, TASKS)
    with pytest.raises(InvalidTask, match="a task without examples, 'none'"):
        expert_losses(either, {"none": lw.Task([])})


def test_rows_of_any_form_are_those_of_the_task_that_they_make(either, monkeypatch):
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    monkeypatch.setattr(either.tokenizer, "chat_template", template)
    rows = [
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "apple"}]},
        {"instruction": "a fruit", "input": "yellow", "target": "pear"},
        ("blue", "plum"),
    ]
    for row in rows:
        table = expert_losses(either, {"t": [row]}, progress=False)
        task = lw.Task.of([row])
        for expert in either.pool.names:
            with either.activate({expert: 1.0}):
                (loss,) = scoring.losses(either.model, either.tokenizer, task, task.examples)
            assert table["t"][expert] == pytest.approx(loss, abs=1e-5)
