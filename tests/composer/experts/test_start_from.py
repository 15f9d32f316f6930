"""Experts that begin as stored adapters."""

import dataclasses

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.errors import (
    AdapterUnsupported,
    BaseModelMismatch,
    LayerMismatch,
    ScopeError,
    WeightingError,
)
from loraweave.hub.base import fingerprint

IDS = {"input_ids": torch.tensor([[3, 9, 27, 20, 11], [5, 7, 44, 19, 8]])}


@pytest.fixture
def model(make_model):
    return make_model("llama")


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
        expected = model(**IDS).logits
    with lw.experts("mixtral", model, pool=adapters, top_k=3) as made:
        torch.testing.assert_close(equal_weights(made)(**IDS).logits, expected, rtol=1e-4, atol=1e-4)


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


def test_without_a_number_of_experts_each_adapter_is_a_task(model, adapters):
    with lw.experts("mixture_of_loras", model, pool=adapters) as made:
        assert made.tasks == ("a", "b", "c")
        assert {shape.num_experts for shape in made.shapes.values()} == {3}


def test_an_adapter_that_is_named_as_a_task_is_that_tasks_wherever_it_is_in_the_pool(model, adapters):
    with lw.experts("flora", model, pool=adapters, mode="additive", tasks=("c", "a", "b")) as made:
        for adapter in adapters:
            for layer in adapter.layers:
                torch.testing.assert_close(made.adapter(adapter.name).delta(layer), adapter.delta(layer))


def test_adapters_whose_names_are_those_of_other_places_are_refused(model, adapters):
    with pytest.raises(WeightingError, match=r"task 'b' of recipe 'flora' has place 0, but .* is at 1 in the pool"):
        lw.experts("flora", model, pool=adapters, mode="additive", tasks=("b", "law", "games"))


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
        expected = made(**IDS).logits
        made.save_pretrained(tmp_path / "saved")
    again = lw.experts(tmp_path / "saved", make_model("llama"))
    assert again.expert_names == ("a", "b", "c")
    assert torch.equal(again(**IDS).logits, expected)


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
        ({"pool": [1]}, WeightingError, "the pool has 1, which is no adapter"),
        ({"pool": []}, WeightingError, "the pool is empty"),
    ],
)
def test_what_cannot_be_begun_from_is_refused(model, adapters, options, error, message):
    with pytest.raises(error, match=message):
        lw.experts("mixtral", model, **{"pool": adapters, **options})


@pytest.mark.parametrize("name", ["hydralora", "multilora"])
def test_a_recipe_whose_experts_share_a_factor_is_refused(model, adapters, name):
    with pytest.raises(ScopeError, match=f"the experts of recipe '{name}' are not each a product of two factors of its own"):
        lw.experts(name, model, pool=adapters)
