"""Expert models that share passes, against each one's own forward and training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.composer.batches import batch, encode, token_losses
from loraweave.composer.experts.expert_job import ExpertJob
from loraweave.composer.experts.train_experts import train_experts
from loraweave.composer.training.fused_pass import FusedPass
from loraweave.composer.training.lora_job import LoraJob
from loraweave.errors import ScopeError, TrainingError

ROWS = {"upper": [("a", "A"), ("bcd", "B")], "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")]}
OPTIONS = {"upper": {"num_experts": (2, 3), "top_k": 2}, "double": {"num_experts": (3, 2), "top_k": 2}}


@pytest.fixture
def base(make_model):
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def models(base):
    """MoLA models whose experts and gates are no longer where they begin."""
    generator = torch.Generator().manual_seed(3)
    made = {name: lw.experts("mola", base, **options) for name, options in OPTIONS.items()}
    with torch.no_grad():
        for model in made.values():
            for parameter in model.expert_parameters().values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return made


def encoded(base, tokenizer, name):
    return encode(base, tokenizer, [text for text, _ in ROWS[name]], [target for _, target in ROWS[name]])


def alone(base, tokenizer, model, rows):
    """Loss and gradients by the expert model's own call with labels, whose targets are all tokens after the prompt."""
    model.train()
    stacked = batch(base, tokenizer, rows)
    labels_BT = torch.full_like(stacked.inputs["input_ids"], -100)
    labels_BT[:, -stacked.targets_BK.shape[1] :] = stacked.targets_BK
    logits_BTV = model(**stacked.inputs, labels=labels_BT).logits
    loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    loss = loss + sum(model.terms.values())
    parameters = [p for p in model.expert_parameters().values() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    model.eval()
    return loss.detach(), gradients


def test_the_gradients_of_expert_models_in_one_pass_are_those_of_each_alone(base, models, tokenizer):
    rows = {name: encoded(base, tokenizer, name) for name in ROWS}
    lora = LoraJob("lora", {"model.layers.1.mlp.down_proj": (torch.randn(2, 24), torch.randn(16, 2))}, 1.0)
    jobs = [ExpertJob("upper", models["upper"]), lora, ExpertJob("double", models["double"])]
    stacked = batch(base, tokenizer, [*rows["upper"], rows["double"][0], *rows["double"]])
    with FusedPass(base, jobs, [2, 1, 3]):
        losses_BK = token_losses(base, stacked)
        penalties = [job.penalty() for job in jobs]
    real_BK = stacked.targets_BK != -100
    assert penalties[0] is not None
    for job, penalty, own in zip(jobs[::2], penalties[::2], (slice(0, 2), slice(3, 6)), strict=True):
        loss = losses_BK[own].sum() / real_BK[own].sum() + penalty
        parameters = job.parameters()
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected_loss, expected = alone(base, tokenizer, models[job.name], rows[job.name])
        assert float(loss.detach()) == pytest.approx(float(expected_loss), abs=1e-9)
        assert any(gradient.abs().max() > 1e-3 for gradient in found)
        for gradient, wanted in zip(found, expected, strict=True):
            assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def trained(base, tokenizer, names, **options):
    made = {name: lw.experts("mola", base, seed=1, **OPTIONS[name]) for name in names}
    settings = {"steps": 5, "batch_size": 2, "lr": 1e-2, "progress": False, **options}
    report = train_experts(base, tokenizer, {name: (made[name], ROWS[name]) for name in names}, **settings)
    state = {name: {key: value.clone() for key, value in model.expert_state().items()} for name, model in made.items()}
    for model in made.values():
        model.close()
    return report, state


def test_an_expert_model_comes_out_the_same_alone_and_beside_others(base, tokenizer):
    report, together = trained(base, tokenizer, ["upper", "double"])
    assert report.num_steps == 5
    for name in ROWS:
        own, expected = trained(base, tokenizer, [name])
        assert report.jobs[name].losses == pytest.approx(own.jobs[name].losses, abs=1e-6)
        assert report.jobs[name].losses[-1] < report.jobs[name].losses[0]
        for key, value in expected[name].items():
            assert torch.allclose(together[name][key], value, atol=1e-6)


def test_held_out_rows_end_the_job_of_an_expert_model(base, tokenizer):
    rows = {"upper": [("a", "x y"), ("b", "x y")]}
    report, _ = trained(base, tokenizer, ["upper", "double"], steps=12, lr=5e-2, held_out=rows, evaluate_every=1, patience=1)
    points = [loss for step, loss in report.jobs["upper"].held_out if step]
    assert report.jobs["upper"].steps == len(points) < report.jobs["double"].steps == 12
    assert points[-1] >= points[-2] == min(points)


def test_modes_and_the_base_are_left_as_they_were(base, tokenizer):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    made = lw.experts("mola", base, **OPTIONS["upper"])
    base.train()
    train_experts(base, tokenizer, {"upper": (made, ROWS["upper"])}, steps=1, batch_size=1, progress=False)
    assert base.training
    assert not made.layers.training
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_what_cannot_share_a_pass_is_refused_before_the_first_step(base, models, make_model, tokenizer):
    other = make_model("llama")
    placed = {"target_modules": ("down_proj",), "task_modules": ("down_proj",)}
    branched = lw.experts("mtlora", base, tasks=("x", "y"), **placed)
    by_task = lw.experts("moelora", base, tasks=("x", "y"), target_modules=("down_proj",))
    cases = [
        ({}, TrainingError, "no expert models"),
        ({"u": (models["upper"], [])}, TrainingError, "'u' has no examples"),
        ({"u": (lw.experts("mola", other), ROWS["upper"])}, TrainingError, "'u' is an expert model of another base"),
        (dict.fromkeys("uv", (models["upper"], ROWS["upper"])), TrainingError, "'u' and 'v' are one expert model"),
        ({"t": (branched, ROWS["upper"])}, (TrainingError, ScopeError), "'mtlora'"),
        ({"t": (by_task, ROWS["upper"])}, ScopeError, "'moelora' looks at the task of each row"),
    ]
    for jobs, error, message in cases:
        with pytest.raises(error, match=message):
            train_experts(base, tokenizer, jobs, steps=1, progress=False)
    with pytest.raises(TrainingError, match="steps is 0"):
        train_experts(base, tokenizer, {"u": (models["upper"], ROWS["upper"])}, steps=0)
