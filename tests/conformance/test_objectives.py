"""What every kind of loss promises; a new file in composer/objectives is tested from the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from properties import Properties
from transformers import GPT2Config, GPT2LMHeadModel

import loraweave as lw
from loraweave import registry
from loraweave.composer.compose import population
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

TASKS = {
    "free": lw.Task([("a", "b c"), ("c d", "a"), ("b", "d d d")], template="z y {input} z"),
    "labels": lw.Task([("a", "b c"), ("c d", "a"), ("b", "b c")], labels=("a", "b c", "d"), template="z y {input} z"),
}

# kinds whose loss of an example depends on how many tokens the others have
TOGETHER = {"LorahubOriginal"}
PROPERTIES = Properties(registry.names("objectives"))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *"abcdyz"]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval().double()
    model.name_or_path = "tiny"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layers = [f"transformer.h.{n}.mlp.c_fc" for n in range(2)]
    adapters = [
        Adapter(name, "tiny", {layer: Factors(torch.randn(2, 16) / 2, torch.randn(64, 2) / 2) for layer in layers})
        for name in "abc"
    ]
    return lw.Composer(model, adapters)


def candidates(count):
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.4
    return [lw.MixtureWeights(row[None, None, None], tuple("abc")) for row in values]


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_a_kind_of_loss_keeps_all_properties(name, request, engine, tokenizer):
    PROPERTIES.walk(request, name, engine=engine, tokenizer=tokenizer)


@PROPERTIES.given
def objective(name, task, engine, tokenizer):
    if name == "labels" and task == "free":
        pytest.skip("ranks labels")
    return ExampleLoss(engine, tokenizer, TASKS[task], kind=name, l1=0.0)


@PROPERTIES.add(task=TASKS)
def losses_are_finite_and_one_for_each_example(objective):
    losses, hits = objective.scores(candidates(4))
    assert losses.shape == hits.shape == (4, 3)
    assert hits.dtype == bool
    assert np.isfinite(losses).all()
    assert (losses >= 0).all()


@PROPERTIES.add(task=TASKS)
def a_population_has_the_losses_of_each_candidate_alone(objective):
    together = objective(candidates(4))
    assert together == pytest.approx([objective([each])[0] for each in candidates(4)], rel=1e-9)
    assert together == pytest.approx(objective.scores(candidates(4))[0].mean(axis=1).tolist(), rel=1e-6)


@PROPERTIES.add(task=TASKS)
def an_example_has_the_same_loss_among_others_and_alone(objective):
    if type(objective.kind).__name__ in TOGETHER:
        pytest.skip("examples share a divisor")
    losses, hits = objective.scores(candidates(2))
    for index in range(3):
        own_losses, own_hits = objective.view([index]).scores(candidates(2))
        assert own_losses[:, 0] == pytest.approx(losses[:, index], rel=1e-9)
        assert (own_hits[:, 0] == hits[:, index]).all()


@PROPERTIES.add(task=TASKS)
def the_order_of_experts_does_not_matter(objective):
    turned = [lw.MixtureWeights(each.values_BTLE.flip(3), ("c", "b", "a")) for each in candidates(3)]
    assert objective(turned) == pytest.approx(objective(candidates(3)), rel=1e-9)


@PROPERTIES.add(task=TASKS)
def examples_in_several_passes_have_the_same_losses_and_gradients(objective, monkeypatch):
    losses = objective(candidates(2))
    gradients = objective.gradients(candidates(2))[1] if objective.differentiable else []
    monkeypatch.setattr(population, "MAX_TOKENS", 4)
    monkeypatch.setattr(population, "MAX_TOKENS_WITH_GRADIENTS", 4)
    assert objective(candidates(2)) == pytest.approx(losses, rel=1e-9)
    if objective.differentiable:
        in_parts, found = objective.gradients(candidates(2))
        assert in_parts == pytest.approx(losses, rel=1e-9)
        assert torch.allclose(torch.cat(found), torch.cat(gradients), rtol=1e-9, atol=1e-12)


@PROPERTIES.add(task=TASKS)
def gradients_are_slopes_where_there_are_any(objective):
    if not objective.differentiable:
        pytest.skip("has none")
    (each,) = candidates(1)
    (loss,), (gradient,) = objective.gradients([each])
    assert loss == pytest.approx(objective([each])[0], rel=1e-9)
    for place in range(3):
        step = torch.zeros_like(each.values_BTLE)
        step[..., place] = 1e-5
        ahead, behind = (lw.MixtureWeights(each.values_BTLE + sign * step, each.experts) for sign in (1, -1))
        slope = (objective([ahead])[0] - objective([behind])[0]) / 2e-5
        assert float(gradient[0, 0, 0, place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
