"""Populations of sums of factors in one forward pass: each candidate has the loss of its sum written into the base."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose import loss
from loraweave.composer.compose.loss import ExampleLoss, together
from loraweave.composer.compose.population import can_be_factor_sums, factor_sums
from loraweave.composer.model.batches import batch, encode, mean_losses

TASK = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")
VALUES = [[0.7, -0.6, 0.3], [0.0, 0.0, 0.0], [0.4, 0.0, -0.2], [1.1, 0.2, 0.5]]


@pytest.fixture
def engine(tiny_llama, make_adapter):
    """Experts of one rank, the last with fewer layers."""
    targets = {"a": ("q_proj", "down_proj"), "b": ("q_proj", "down_proj"), "c": ("q_proj",)}
    named = enumerate(targets.items())
    return lw.Composer(tiny_llama, [make_adapter(tiny_llama, name, targets=own, seed=seed) for seed, (name, own) in named])


def mixtures(values=VALUES, experts="abc"):
    return [lw.MixtureWeights(torch.tensor(row)[None, None, None], tuple(experts)) for row in values]


@torch.no_grad()
def written(engine, tokenizer, candidate, only=(0, 1, 2)):
    """The loss with a = sum of w_e a_e and b = sum of w_e b_e written densely into the weights."""
    weights = candidate.values_BTLE.flatten().tolist()
    model = copy.deepcopy(engine.model)
    adapters = list(engine.pool.adapters.values())
    for layer in engine.pool.layer_names:
        own = [(adapter.layers[layer], w) for adapter, w in zip(adapters, weights, strict=True) if layer in adapter.layers]
        a_RI = sum(w * factors.a_RI for factors, w in own)
        b_OR = sum(w * factors.b_OR for factors, w in own)
        model.get_submodule(layer).weight += b_OR @ a_RI
    pairs = [TASK.examples[index] for index in only]
    rows = encode(model, tokenizer, [TASK.prompt(text) for text, _ in pairs], [target for _, target in pairs])
    return float(mean_losses(model, batch(model, tokenizer, rows)).mean())


def test_a_population_has_the_losses_of_factors_mixed_apart(engine, tokenizer):
    objective = ExampleLoss(engine, tokenizer, TASK, merge_method="factor_sum", l1=0.0)
    expected = [written(engine, tokenizer, each) for each in mixtures()]
    assert objective(mixtures()) == pytest.approx(expected, rel=2e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)


@pytest.mark.own_models
def test_views_together_share_one_forward_pass(engine, tokenizer):
    whole = ExampleLoss(engine, tokenizer, TASK, merge_method="factor_sum", l1=0.0)
    whole(mixtures()[:1])
    calls = []
    engine.model.register_forward_hook(lambda *_: calls.append(1))
    found = together([whole.view([0, 1]), whole.view([2])], [mixtures()[:2], mixtures()[2:]])
    assert len(calls) == 1
    expected = [[written(engine, tokenizer, each, (0, 1)) for each in mixtures()[:2]]]
    expected.append([written(engine, tokenizer, each, (2,)) for each in mixtures()[2:]])
    for own, losses in zip(found, expected, strict=True):
        assert own == pytest.approx(losses, rel=2e-5)


def test_more_candidates_than_fit_at_a_time_have_the_same_losses(engine, tokenizer, monkeypatch):
    objective = ExampleLoss(engine, tokenizer, TASK, merge_method="factor_sum")
    together_losses = objective(mixtures())
    monkeypatch.setattr(loss, "MAX_CANDIDATES", 3)
    assert objective(mixtures()) == pytest.approx(together_losses, rel=1e-5)


def test_biases_are_summed_with_the_weights(make_model, make_adapter):
    model = make_model("gpt2")
    adapters = [make_adapter(model, name, targets=["c_fc"], seed=seed, bias=name != "b") for seed, name in enumerate("abc")]
    merged = factor_sums(lw.Composer(model, adapters), mixtures())
    for number, row in enumerate(VALUES):
        for layer, factors in merged.pool[str(number)].layers.items():
            expected = row[0] * adapters[0].layers[layer].bias_O + row[2] * adapters[2].layers[layer].bias_O
            assert torch.allclose(factors.bias_O, expected, atol=1e-6)


def test_what_cannot_be_summed_factor_by_factor_is_left_to_the_merge_method(engine, tiny_llama, make_adapter):
    assert can_be_factor_sums(engine.pool, mixtures())
    by_layer = lw.MixtureWeights(torch.ones(1, 1, 2, 3), tuple("abc"), tuple(engine.target_layers)[:2])
    assert not can_be_factor_sums(engine.pool, [*mixtures(), by_layer])
    assert not can_be_factor_sums(engine.pool, mixtures([[1.0]], "z"))
    other_rank = lw.ExpertPool([make_adapter(tiny_llama, "a"), make_adapter(tiny_llama, "b", rank=2)])
    assert not can_be_factor_sums(other_rank, mixtures([[1.0, 0.0]], "ab"))
    with_gain = lw.ExpertPool([make_adapter(tiny_llama, "a", gain=True)])
    assert not can_be_factor_sums(with_gain, mixtures([[1.0]], "a"))


def test_a_mixture_that_leaves_out_what_does_not_fit_is_scored_all_the_same(tiny_llama, make_adapter, tokenizer):
    adapters = [make_adapter(tiny_llama, "a"), make_adapter(tiny_llama, "b", rank=2)]
    engine = lw.Composer(tiny_llama, adapters)
    objective = ExampleLoss(engine, tokenizer, TASK, merge_method="factor_sum", l1=0.0)
    alone, both = objective(mixtures([[0.5, 0.0], [0.5, 0.5]], "ab"))
    only_a = ExampleLoss(lw.Composer(tiny_llama, adapters[:1]), tokenizer, TASK, merge_method="factor_sum", l1=0.0)
    assert alone == pytest.approx(only_a(mixtures([[0.5]], "a"))[0], rel=1e-5)
    assert both != both
    assert objective.failures.first.startswith("LayerMismatch: ")


def test_factors_in_bf16_are_summed_as_the_same_numbers_in_fp32(tiny_llama, make_adapter, tokenizer):
    def rounded(adapter, dtype):
        layers = {
            layer: replace(each, a_RI=each.a_RI.bfloat16().to(dtype), b_OR=each.b_OR.bfloat16().to(dtype))
            for layer, each in adapter.layers.items()
        }
        return replace(adapter, layers=layers)

    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("abc")]
    half, exact = (
        ExampleLoss(
            lw.Composer(tiny_llama, [rounded(each, dtype) for each in adapters]), tokenizer, TASK, merge_method="factor_sum"
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half(mixtures()) == exact(mixtures())
