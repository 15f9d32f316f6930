"""LoraHub's loss as coded, against the authors' formula written out with dense weights and the model's own loss."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.composer import Composer
from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

NAMES = ("a", "b", "c")
EXAMPLES = [("is it good?", "yes"), ("no", "no"), ("a long question, and more", "maybe so"), ("x", "y"), ("12", "34")]
TASK = Task(EXAMPLES)


@pytest.fixture
def adapters(make_adapter, tiny_llama):
    return [make_adapter(tiny_llama, name, rank=2, seed=seed) for seed, name in enumerate(NAMES)]


@pytest.fixture
def engine(tiny_llama, adapters):
    return Composer(tiny_llama, ExpertPool(adapters))


@pytest.fixture
def loss(engine, tokenizer):
    return ExampleLoss(engine, tokenizer, TASK, kind="lorahub_original", merge_method="factor_sum", l1=0.05)


def mixture(*values):
    return MixtureWeights.of(dict(zip(NAMES, values, strict=True)), NAMES)


@torch.no_grad()
def as_coded(model, tokenizer, adapters, values, num_examples):
    """get_score of lorahub/algorithm.py on a model of its own, with the model's loss of padded batches."""
    for layer in adapters[0].layers:
        a_RI = sum(value * adapter.layers[layer].a_RI for value, adapter in zip(values, adapters, strict=True))
        b_OR = sum(value * adapter.layers[layer].b_OR for value, adapter in zip(values, adapters, strict=True))
        model.get_submodule(layer).weight += b_OR @ a_RI
    rows = []
    for text, target in EXAMPLES[:num_examples]:
        prompt = tokenizer(TASK.prompt(text))["input_ids"]
        rows.append((prompt, tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]))
    longest = max(len(prompt) + len(target) for prompt, target in rows)
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
    for row, (prompt, target) in enumerate(rows):
        length = len(prompt) + len(target)
        ids[row, :length] = torch.tensor(prompt + target)
        labels[row, len(prompt) : length] = torch.tensor(target)
        mask[row, :length] = 1
    train_loss = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    return train_loss / len(rows) + 0.05 * sum(abs(value) for value in values) / len(values)


@pytest.mark.parametrize("num_examples", [1, 2, 5])
@pytest.mark.parametrize("values", [(0.7, -0.4, 0.2), (0.0, 1.5, 0.0), (0.0, 0.0, 0.0)])
def test_it_is_the_loss_of_the_authors_code(values, num_examples, loss, tokenizer, make_model, adapters):
    (found,) = loss.view(range(num_examples))([mixture(*values)])
    assert found == pytest.approx(as_coded(make_model("llama"), tokenizer, adapters, values, num_examples), abs=2e-5)


def test_the_sign_of_all_weights_does_not_matter(loss):
    first, second = loss([mixture(0.7, -0.4, 0.2), mixture(-0.7, 0.4, -0.2)])
    assert first == pytest.approx(second, abs=1e-6)


def test_weight_one_is_the_adapter_and_a_weight_counts_twice(loss, engine, tokenizer):
    plain = ExampleLoss(engine, tokenizer, TASK, kind="lorahub_original", l1=0.0)
    one, half = plain([mixture(0.0, 1.0, 0.0), mixture(0.0, 0.25, 0.0)])
    squared = loss([mixture(0.0, 1.0, 0.0), mixture(0.0, 0.5, 0.0)])
    assert squared == pytest.approx([one + 0.05 / 3, half + 0.05 * 0.5 / 3], abs=1e-5)


def test_the_published_recipe_is_not_worse_than_the_base_and_the_same_for_a_seed(loss):
    pytest.importorskip("nevergrad")
    results = [LorahubOriginal(NAMES, seed=1).solve(loss) for _ in range(2)]
    base = loss([mixture(0.0, 0.0, 0.0)])[0]
    assert results[0] == results[1]
    assert results[0].losses[0] == base
    assert results[0].loss <= base


def test_compose_takes_the_recipe_whole(loss, adapters, tiny_llama, tokenizer):
    pytest.importorskip("nevergrad")
    by_hand = LorahubOriginal(NAMES, seed=1).solve(loss)
    options = {"method": "lorahub_original", "folds": 0, "seed": 1, "progress": False}
    found = lw.compose(tiny_llama, tokenizer, ExpertPool(adapters), TASK, **options)
    assert found.weights == by_hand.weights
    assert found.merge_method == "factor_sum"
