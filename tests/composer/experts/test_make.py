"""What `experts` makes of a name, and of stored adapters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.experts import expert_model
from loraweave.errors import (
    AdapterUnsupported,
    BaseModelMismatch,
    CompositionError,
    LayerMismatch,
    PackageMissing,
    ScopeError,
    UnknownName,
    WeightingError,
)
from loraweave.hub.base import fingerprint

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


def test_what_is_no_model_is_refused():
    with pytest.raises(CompositionError, match="not 'SmolLM2': load it first"):
        lw.experts("mola", "SmolLM2")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 4, "a list, each of which is a whole number"),
        ("target_modules", "q_proj", "a list, each of which is a text"),
        ("as_released", 1, "True or False"),
        ("alpha", True, "a finite number above 0 or None"),
    ],
)
def test_an_option_of_another_type_says_what_it_should_be(make_model, option, value, message):
    with pytest.raises(WeightingError, match=f"recipe 'mola' got {option}={value!r}; it takes {message}"):
        lw.experts("mola", make_model("llama"), **{option: value})


@pytest.mark.parametrize("name", [None, 5])
def test_what_is_no_name_is_refused(make_model, name):
    with pytest.raises(UnknownName, match=f"{name} is neither a recipe's name nor a folder; recipes are .*hydralora, "):
        lw.experts(name, make_model("llama"))


@pytest.fixture
def adapters(model, make_adapters):
    """Of ranks 1, 4 and 3, in different layers."""
    return make_adapters(model, "llama")


def equal_weights(made):
    with torch.no_grad():
        for gate in made.gates.values():
            for parameter in gate.parameters():
                parameter.zero_()
    return made


def test_with_equal_weights_it_is_the_engines_mixture_of_the_adapters(model, adapters):
    with Composer(model, adapters).activate({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}):
        expected = model(input_ids=IDS_BT).logits
    with lw.experts("mixtral", model, pool=adapters, top_k=3) as made:
        torch.testing.assert_close(equal_weights(made)(input_ids=IDS_BT).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_each_expert_is_its_adapter(model, adapters, alpha):
    with lw.experts("mola", model, pool=adapters, alpha=alpha) as made:
        assert made.expert_names == ("a", "b", "c")
        for number, adapter in enumerate(adapters):
            found = made.expert(number)
            assert found.layers.keys() == adapter.layers.keys()
            for layer in adapter.layers:
                torch.testing.assert_close(found.delta(layer), adapter.delta(layer))


def test_fewer_experts_begin_as_the_means_of_alike_adapters(model, make_adapter):
    first, second = make_adapter(model, "first", seed=1), make_adapter(model, "second", seed=2)
    pool = [first, second, dataclasses.replace(first, name="again")]
    with lw.experts("mixtral", model, pool=pool, num_experts=2) as made:
        assert made.expert_names == ("first+again", "second")
        for number, adapter in enumerate([first, second]):
            for layer in adapter.layers:
                torch.testing.assert_close(made.expert(number).delta(layer), adapter.delta(layer))


def test_what_a_search_found_is_taken_from_its_hub(model, adapters, tmp_path):
    hub = lw.Hub(tmp_path / "hub")
    for adapter in adapters:
        hub.add(adapter, description=f"task {adapter.name}")
    found = hub.search("task b", k=2)
    names = tuple(candidate.name for candidate in found)
    with lw.experts("mixtral", model, pool=found) as made:
        assert made.expert_names == names
    with lw.experts("mixtral", model, pool=hub) as made:
        assert made.expert_names == ("a", "b", "c")
    # candidates alone do not know it
    with pytest.raises(WeightingError, match=r"whose adapters are in a hub: pass hub=\.\.\. beside pool"):
        lw.experts("mixtral", model, pool=list(found))
    with lw.experts("mixtral", model, pool=list(found), hub=hub) as made:
        assert made.expert_names == names


def test_it_is_trained_saved_and_read_with_its_names(model, make_model, adapters, tmp_path):
    rows = [{"input_ids": [3 + i, 4, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(5)]
    with lw.experts("mixtral", model, pool=adapters) as made:
        made.fit(rows, steps=3, batch_size=2, warmup=0, progress=False)
        assert made.training_report.experts == ("a", "b", "c")
        expected = made(input_ids=IDS_BT).logits
        made.save_pretrained(tmp_path / "saved")
    again = lw.experts(tmp_path / "saved", make_model("llama"))
    assert again.expert_names == ("a", "b", "c")
    assert torch.equal(again(input_ids=IDS_BT).logits, expected)


def test_the_adapters_are_not_changed_by_training(model, adapters):
    before = [adapter.hash for adapter in adapters]
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
    with lw.experts("mixtral", model, pool=adapters) as made:
        made.fit(rows, steps=2, batch_size=1, warmup=0, progress=False)
    assert [dataclasses.replace(adapter).hash for adapter in adapters] == before


def test_adapters_of_another_base_are_refused(model, make_model, adapters):
    other = fingerprint(make_model("llama", num_hidden_layers=3))
    pool = [dataclasses.replace(adapter, fingerprint=other) for adapter in adapters]
    with pytest.raises(BaseModelMismatch, match="expert 'a' was made for another base model"):
        lw.experts("mixtral", model, pool=pool)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_of_another_size_is_refused(make_model, adapters):
    with pytest.raises(LayerMismatch):
        lw.experts("mixtral", make_model("llama", hidden_size=32), pool=adapters)


def test_an_adapter_with_a_gain_is_refused_by_name(model, make_adapter):
    with pytest.raises(AdapterUnsupported, match=r"expert 'g' changes layer .* by more than a product of two factors"):
        lw.experts("mixtral", model, pool=[make_adapter(model, "g", gain=True)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ("q_proj",)}, WeightingError, "target_modules cannot be given with a pool"),
        ({"num_experts": 4}, WeightingError, "num_experts is 4, but the pool has 3 adapters"),
        ({"num_experts": 0}, WeightingError, "num_experts is 0"),
        ({"pool": [1]}, WeightingError, "the pool has 1, not an adapter"),
        ({"pool": []}, WeightingError, "the pool is empty"),
    ],
)
def test_what_cannot_be_begun_from_is_refused(model, adapters, options, error, message):
    with pytest.raises(error, match=message):
        lw.experts("mixtral", model, **{"pool": adapters, **options})


def test_a_recipe_whose_experts_share_a_factor_is_refused(model, adapters):
    with pytest.raises(ScopeError, match="the experts of recipe 'hydralora' are not each a product of two factors"):
        lw.experts("hydralora", model, pool=adapters)


def test_without_the_extension_that_trains_experts_they_answer_and_are_neither_trained_nor_begun(
    make_model, adapters, monkeypatch
):
    monkeypatch.setattr(expert_model.registry, "brought", lambda part: {})
    model = make_model("llama")
    with lw.experts("mixtral", model, rank=2) as made:
        assert made(IDS_BT).logits.shape[:2] == IDS_BT.shape
        with pytest.raises(PackageMissing, match="none of the extensions at hand trains expert models"):
            made.fit([("a", "A")], progress=False)
    with pytest.raises(PackageMissing, match="or begins them as adapters"):
        lw.experts("mixtral", model, pool=adapters)
