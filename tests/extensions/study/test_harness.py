"""Scores of lm_eval on a task of a local file: those of a live mixture are those of the merged model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName, WeightingError
from loraweave.extensions.study import evaluate_harness

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The folder of a task `letters` of six documents."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": "ab" * n, "choices": ["a", "bb", "c" * n], "right": n % 3} for n in range(1, 7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


def scores(what, folder, **arguments):
    """(accuracy, log-likelihoods of all choices in the order of the documents)."""
    found = evaluate_harness(what, ["letters"], include_path=folder, bootstrap_iters=0, **arguments)
    samples = sorted(found["samples"]["letters"], key=lambda sample: sample["doc_id"])
    losses = torch.tensor([[answer[0][0] for answer in sample["resps"]] for sample in samples])
    return found["results"]["letters"]["acc,none"], losses


@pytest.fixture
def adapters(tiny_llama, make_adapters):
    return make_adapters(tiny_llama, "llama")


@pytest.fixture
def merged(adapters, tiny_llama, tmp_path):
    lw.merge(adapters, [1.5, 0.0, -0.8], progress=False).save_pretrained(tmp_path / "peft")
    return PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "peft").merge_and_unload().eval()


def test_every_form_of_a_mixture_scores_as_the_merged_model_does(adapters, merged, tiny_llama, tokenizer, tasks):
    first, _, third = adapters
    weights = {first.name: 1.5, third.name: -0.8}
    composition = lw.compose(
        tiny_llama, tokenizer, adapters, lw.Task([("a", "b")]), method="manual", weights=weights, progress=False
    )
    on = {"model": tiny_llama, "tokenizer": tokenizer}
    wanted, wanted_losses = scores(None, tasks, model=merged, tokenizer=tokenizer)
    _, base_losses = scores(None, tasks, **on)
    assert (wanted_losses - base_losses).abs().max() > 0.01
    for what, more in (
        (composition, {}),
        (composition.adapter, on),
        (weights, {**on, "hub_or_pool": adapters}),
        (lw.parse(f"1.5*{first.name} - 0.8*{third.name}"), {**on, "hub_or_pool": adapters}),
    ):
        found, losses = scores(what, tasks, **more)
        assert found == wanted
        assert torch.allclose(losses, wanted_losses, atol=1e-4)
    assert torch.equal(scores(None, tasks, **on)[1], base_losses)


def test_a_routers_scores_are_those_of_each_row_alone(adapters, tiny_llama, tokenizer, tasks):
    router = lw.router("arrow", lw.ExpertPool(adapters), top_k=1)
    on = {"model": tiny_llama, "tokenizer": tokenizer, "hub_or_pool": adapters}
    _, losses = scores(router, tasks, **on)
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"] + tokenizer("bb", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), lw.Composer(tiny_llama, adapters).activate(router):
        logits = tiny_llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    alone = sum(float(logits[place - 1, ids[place]]) for place in (2, 3))
    assert float(losses[0, 1]) == pytest.approx(alone, abs=1e-4)
    with pytest.raises(ScopeError, match="leave batch_size=2 out"):
        scores(router, tasks, batch_size=2, **on)


def test_an_average_is_scored_by_its_averaged_probabilities(adapters, tiny_llama, tokenizer, tasks):
    members = {
        adapter.name: replace(lw.Composition.of(tiny_llama, tokenizer, lw.Task([("a", "b")]), adapter), share=share)
        for adapter, share in zip(adapters[:2], (1.0, 3.0), strict=True)
    }
    average = lw.Composition.of(tiny_llama, tokenizer, lw.Task([("a", "b")]), members)
    _, losses = scores(average, tasks)
    # a choice of one token
    alone = [scores(member, tasks)[1][0, 0] for member in members.values()]
    assert float(losses[0, 0].exp()) == pytest.approx(float(alone[0].exp() + 3 * alone[1].exp()) / 4, rel=1e-4)
    steps = replace(average, members={"steps": replace(average, members={}, steps=members)})
    with pytest.raises(ScopeError, match="member 'steps' of the average answers in steps"):
        scores(steps, tasks)


def test_an_expert_model_is_scored_as_a_model(make_model, tokenizer, tasks):
    with lw.experts("mola", make_model("llama"), num_experts=(2,), rank=2, target_modules=("q_proj",)) as made:
        with torch.no_grad():
            for value in made.expert_parameters().values():
                value.normal_(std=0.3)
        _, losses = scores(made, tasks, tokenizer=tokenizer)
        _, base = scores(None, tasks, model=made.base_model, tokenizer=tokenizer)
        assert (losses - base).abs().max() > 0.01


@pytest.mark.own_models
def test_the_callers_random_numbers_and_the_model_are_as_before(adapters, tiny_llama, tokenizer, tasks):
    tiny_llama.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    scores(adapters[0], tasks, model=tiny_llama, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_llama.training
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


@pytest.mark.parametrize(
    ("what", "arguments", "error", "words"),
    [
        pytest.param(None, {"tasks": ["no_such_task"]}, UnknownName, "has no task 'no_such_task'", marks=pytest.mark.slow),
        (None, {"tasks": "letters"}, WeightingError, "tasks is 'letters': give a list of names"),
        (None, {"tasks": ["letters"], "model": None}, WeightingError, "needs model="),
        ({"a": 1.0}, {"tasks": ["letters"]}, WeightingError, "needs hub_or_pool="),
        (3, {"tasks": ["letters"]}, WeightingError, "but got 3"),
        (None, {"tasks": ["letters"], "batch_size": 0}, WeightingError, "batch_size is 0"),
    ],
)
def test_what_cannot_be_scored_is_a_named_error(what, arguments, error, words, tiny_llama, tokenizer):
    with pytest.raises(error, match=words):
        evaluate_harness(what, **{"model": tiny_llama, "tokenizer": tokenizer, **arguments})
