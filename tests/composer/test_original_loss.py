"""LoraHub's loss as coded, against the authors' formula written out with dense weights and the model's own loss."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.original_loss import OriginalLoss
from loraweave.errors import WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.lorahub_original import LorahubOriginal
from loraweave.routers.mixture import MixtureWeights
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


def mixture(*values):
    return MixtureWeights.of(dict(zip(NAMES, values, strict=True)), NAMES)


@torch.no_grad()
def as_coded(model, tokenizer, adapters, values, batch_size):
    """get_score of lorahub/algorithm.py on a model of its own, with the model's loss of padded batches."""
    for layer in adapters[0].layers:
        a_RI = sum(value * adapter.layers[layer].a_RI for value, adapter in zip(values, adapters, strict=True))
        b_OR = sum(value * adapter.layers[layer].b_OR for value, adapter in zip(values, adapters, strict=True))
        model.get_submodule(layer).weight += b_OR @ a_RI
    rows = []
    for text, target in EXAMPLES:
        prompt = tokenizer(TASK.prompt(text))["input_ids"]
        rows.append((prompt, tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]))
    train_loss = 0.0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = max(len(prompt) + len(target) for prompt, target in part)
        ids, labels, mask = (torch.full((len(part), longest), fill) for fill in (0, -100, 0))
        for row, (prompt, target) in enumerate(part):
            length = len(prompt) + len(target)
            ids[row, :length] = torch.tensor(prompt + target)
            labels[row, len(prompt) : length] = torch.tensor(target)
            mask[row, :length] = 1
        train_loss += float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    return train_loss / len(rows) + 0.05 * sum(abs(value) for value in values) / len(values)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 8])
@pytest.mark.parametrize("values", [(0.7, -0.4, 0.2), (0.0, 1.5, 0.0), (0.0, 0.0, 0.0)])
def test_it_is_the_loss_of_the_authors_code(values, batch_size, engine, tokenizer, make_model, adapters):
    (found,) = OriginalLoss(engine, tokenizer, TASK, batch_size=batch_size)([mixture(*values)])
    expected = as_coded(make_model("llama"), tokenizer, adapters, values, batch_size or len(EXAMPLES))
    assert found == pytest.approx(expected, abs=2e-5)


def test_the_sign_of_all_weights_does_not_matter(engine, tokenizer):
    loss = OriginalLoss(engine, tokenizer, TASK)
    first, second = loss([mixture(0.7, -0.4, 0.2), mixture(-0.7, 0.4, -0.2)])
    assert first == pytest.approx(second, abs=1e-6)


@torch.no_grad()
def test_weight_one_is_the_adapter_and_zero_the_base(engine, tokenizer, tiny_llama):
    loss, ids = OriginalLoss(engine, tokenizer, TASK), torch.randint(3, 60, (2, 7))
    base = tiny_llama(ids).logits
    with engine.fused({"b": 1.0}, method=loss.merge_method):
        fused = tiny_llama(ids).logits
    with engine.activate({"b": 1.0}):
        assert torch.allclose(tiny_llama(ids).logits, fused, atol=1e-4)
    loss([mixture(0.3, 0.2, 0.1), mixture(0.0, 0.0, 0.0)])
    assert torch.equal(tiny_llama(ids).logits, base)


def test_the_published_recipe_is_not_worse_than_the_base_and_the_same_for_a_seed(engine, tokenizer):
    pytest.importorskip("nevergrad")
    loss = OriginalLoss(engine, tokenizer, TASK)
    results = [LorahubOriginal(NAMES, seed=1).solve(loss) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].loss <= loss([mixture(0.0, 0.0, 0.0)])[0]
    assert results[0].losses[0] == loss([mixture(0.0, 0.0, 0.0)])[0]


def test_a_batch_without_examples_is_refused(engine, tokenizer):
    with pytest.raises(WeightingError, match="batch_size is 0"):
        OriginalLoss(engine, tokenizer, TASK, batch_size=0)
