"""L-LoRA: adapters trained to first order are the tangent of LoRA and superpose exactly in each layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import jvp

import loraweave as lw
from loraweave.composer.model.batches import encode
from loraweave.composer.train import shared as shared_training
from loraweave.composer.train.jobs import LORA, LoraSettings, job_losses, lora_job
from loraweave.errors import LayerMismatch
from loraweave.extensions.continual import Linearized, tangent
from loraweave.lowrank import algebra

TASKS = {"upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")], "double": [("a", "aa"), ("bb", "bbbb")]}
LAYER = "model.layers.0.self_attn.q_proj"
SCALE = 2.0


def train(model, tokenizer, tasks=TASKS, **options):
    settings = {"rank": 3, "steps": 6, "batch_size": 2, "lr": 1e-2, "progress": False, "kind": Linearized()}
    return lw.train_adapters(model, tokenizer, tasks, **{**settings, **options})


def jobs_of(model, layers, names, start):
    """Linearised jobs of rank 3 and scale 2 with these starts."""
    settings = LoraSettings(rank=3, alpha=6.0)
    return [lora_job(model, name, layers, settings, start.get(name), Linearized()) for name in names]


@pytest.fixture
def begin(tiny_llama, make_adapter):
    return make_adapter(tiny_llama, "begin", rank=5, seed=4)


@pytest.fixture
def moved(tiny_llama, begin):
    """Jobs in float64, one with b0 = 0 and one with a start, moved away from where they began."""
    jobs = jobs_of(tiny_llama, {LAYER: (16, 16)}, ["new", "old"], {"old": begin.layers})
    generator = torch.Generator().manual_seed(2)
    for job in jobs:
        job.origin = {layer: tuple(tensor.double() for tensor in pair) for layer, pair in job.origin.items()}
        for layer, (a0, b0) in job.origin.items():
            trained = job.factors[layer][0].requires_grad
            a, b = (t + torch.randn(t.shape, generator=generator).double() for t in (a0, b0))
            job.factors[layer] = (a.requires_grad_(), b) if trained else (a0, b)
    return jobs


# torch's own rules of forward differentiation are compiled by what it has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("index", [0, 1])
def test_the_update_of_a_layer_is_the_jvp_of_lora_at_the_beginning(moved, index):
    x_NI = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).double()
    a, b = (tensor.detach() for tensor in moved[index].factors[LAYER])
    a0, b0 = moved[index].origin[LAYER]
    value, slope = jvp(lambda a, b: SCALE * x_NI @ a.T @ b.T, (a0, b0), (a - a0, b - b0))
    found = moved[index].update(LAYER, x_NI)
    assert torch.allclose(found, value + slope, atol=1e-12)


def test_parameters_merged_around_the_beginning_superpose_in_each_layer(tiny_llama, begin):
    x_NI = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    names = ["u", "v", "merged", "none"]
    jobs = jobs_of(tiny_llama, {}, names, dict.fromkeys(names, begin.layers))
    weights = (0.7, -0.4)
    with torch.no_grad():
        for u, v, merged, none in zip(*(job.factors[LAYER] for job in jobs), strict=True):
            u += torch.randn(u.shape, generator=torch.Generator().manual_seed(3))
            v += torch.randn(v.shape, generator=torch.Generator().manual_seed(4))
            merged += sum(w * (part - none) for w, part in zip(weights, (u, v), strict=True))
        u, v, merged, none = (job.update(LAYER, x_NI) for job in jobs)
    assert torch.allclose(merged - none, 0.7 * (u - none) - 0.4 * (v - none), atol=1e-4)
    assert not torch.allclose(u, none, atol=1e-1)


def test_without_a_start_jobs_share_an_a_that_is_not_trained(tiny_llama, tokenizer):
    found = train(tiny_llama, tokenizer)
    alone = train(tiny_llama, tokenizer, {"double": TASKS["double"]})
    for layer, factors in found["upper"].layers.items():
        assert factors.rank == 3
        assert torch.equal(factors.a_RI, found["double"].layers[layer].a_RI)
        assert torch.equal(factors.a_RI, alone["double"].layers[layer].a_RI)
        assert not torch.equal(factors.b_OR, found["double"].layers[layer].b_OR)


def test_without_a_start_a_merge_of_parameters_is_the_mixture_of_updates(tiny_llama, tokenizer):
    u, v = train(tiny_llama, tokenizer).values()
    mixed = lw.merge([u, v], [0.7, 0.3], progress=False)
    assert lw.merge([u, v], [0.7, 0.3], method="factor_average", progress=False).rank == 3
    for layer, factors in lw.merge([u, v], [0.7, 0.3], method="factor_average", progress=False).layers.items():
        assert torch.allclose(algebra.delta(factors), mixed.delta(layer), atol=1e-6)


def test_a_trained_adapter_is_the_update_of_the_training_forward(moved):
    x_NI = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).double()
    for job, rank in zip(moved, (3, 10), strict=True):
        factors = job.result()[LAYER]
        assert factors.rank == rank
        found = x_NI @ factors.a_RI.T @ factors.b_OR.T
        expected = job.update(LAYER, x_NI)
        assert torch.allclose(found, expected, atol=1e-9)


def test_start_and_tangents_in_a_pool_are_the_linearised_model_at_the_merged_parameters(tiny_llama, tokenizer, begin):
    trained = train(tiny_llama, tokenizer, start=dict.fromkeys(TASKS, begin))
    tangents = {name: tangent(adapter, begin) for name, adapter in trained.items()}
    weights = {"begin": 1.0, "upper": 0.7, "double": -0.4}
    mixed = lw.merge([begin, *tangents.values()], list(weights.values()), progress=False)
    for layer, start in begin.layers.items():
        a0, b0 = start.a_RI.double(), start.b_OR.double()
        a, b = a0.clone(), b0.clone()
        for name, adapter in trained.items():
            factors = adapter.layers[layer]
            # phi of the task, read off its factors: [b, b0] over [a0, a - a0]
            a += weights[name] * factors.a_RI[5:].double()
            b += weights[name] * (factors.b_OR[:, :5].double() - b0)
        expected = b @ a0 + b0 @ (a - a0)
        assert torch.allclose(mixed.delta(layer).double(), expected, atol=1e-5)
        assert max(t.layers[layer].rank for t in tangents.values()) == 10


def test_a_start_and_its_tangent_are_the_trained_adapter(tiny_llama, tokenizer, begin):
    trained = train(tiny_llama, tokenizer, {"upper": TASKS["upper"]}, start={"upper": begin})["upper"]
    whole = lw.merge([begin, tangent(trained, begin)], [1.0, 1.0])
    for layer in trained.layers:
        assert torch.allclose(whole.delta(layer), trained.delta(layer), atol=1e-6)
        assert not torch.allclose(whole.delta(layer), begin.delta(layer), atol=1e-3)


def test_from_a_start_whose_b_is_zero_an_adapter_is_its_own_tangent(tiny_llama, tokenizer, begin):
    zero = replace(begin, layers={layer: replace(f, b_OR=torch.zeros_like(f.b_OR)) for layer, f in begin.layers.items()})
    trained = train(tiny_llama, tokenizer, {"upper": TASKS["upper"]}, start={"upper": zero})["upper"]
    assert trained.rank == 5
    assert tangent(trained, zero).hash == trained.hash


def test_an_adapter_that_was_not_trained_linearised_has_no_tangent(tiny_llama, tokenizer, begin, make_adapter):
    plain = train(tiny_llama, tokenizer, start={"upper": begin}, kind=LORA)["upper"]
    with pytest.raises(LayerMismatch, match="not a linearised training of 'begin'"):
        tangent(plain, begin)
    with pytest.raises(LayerMismatch, match="other layers"):
        tangent(make_adapter(tiny_llama, "other", targets=("down_proj",)), begin)


def test_training_lowers_the_loss(tiny_llama, tokenizer, begin):
    rows = encode(tiny_llama, tokenizer, [text for text, _ in TASKS["upper"]], [target for _, target in TASKS["upper"]])

    for start in ({}, {"upper": begin}):
        task = lw.Task(TASKS["upper"], template="{input}")
        trained = train(tiny_llama, tokenizer, {"upper": task}, start=start, steps=40, lr=3e-2)
        engine = lw.Composer(tiny_llama, [begin, trained["upper"]])
        with torch.no_grad():
            with engine.activate({"begin": 1.0} if start else {}):
                before = float(job_losses(tiny_llama, tokenizer, rows, 1))
            with engine.activate({"upper": 1.0}):
                after = float(job_losses(tiny_llama, tokenizer, rows, 1))
        assert after < 0.9 * before


def test_interrupted_training_resumes_to_the_same_bits(tiny_llama, tokenizer, begin, tmp_path, monkeypatch, watch_steps):
    monkeypatch.setattr(shared_training, "CHECKPOINT_STEPS", 2)
    # one job with a trained a beside one whose a stays
    whole = train(tiny_llama, tokenizer, start={"double": begin})
    steps = watch_steps(kill_at=5)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama, tokenizer, start={"double": begin}, checkpoint=tmp_path)
    resumed = train(tiny_llama, tokenizer, start={"double": begin}, checkpoint=tmp_path)
    assert len(steps) == 5 + 2
    assert {name: adapter.hash for name, adapter in resumed.items()} == {name: a.hash for name, a in whole.items()}


def test_compose_searches_over_linearised_adapters(tiny_llama, tokenizer):
    pool = lw.ExpertPool(train(tiny_llama, tokenizer, steps=20))
    task = lw.Task(TASKS["upper"])
    found = lw.compose(tiny_llama, tokenizer, pool, task, method="lorahub", budget=12, folds=0, progress=False)
    assert found.report["lorahub"].loss < found.report["base"].loss
