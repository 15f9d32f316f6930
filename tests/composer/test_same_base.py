"""One rule at every entrance: whose base model the adapters name, whose weights they have sampled, whose layers they fit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave import registry
from loraweave.errors import BaseModelMismatch, BaseModelUnverified, EmptyIndex
from loraweave.hub.base import fingerprint

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
IDS_BT = torch.tensor([[5, 9, 3]])
TASK = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")


class OneVector:
    """An embedder that finds everything alike, so that only filters choose."""

    dim = 2
    id = "one vector"

    def embed(self, texts):
        return np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (len(texts), 1))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: OneVector if folder == "embedders" else get(folder, name))
    with lw.Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def model(make_model):
    model = make_model("llama")
    model.name_or_path = "org/base"
    return model


@pytest.fixture
def known(model, make_adapter):
    return replace(make_adapter(model, "known", seed=8), fingerprint=fingerprint(model))


def first_use(model, adapter, tokenizer):
    engine = lw.Composer(model, lw.ExpertPool.on_demand(["x"], lambda name: adapter))
    with engine.activate({"x": 1.0}):
        model(IDS_BT)


ENTRANCES = {
    "Composer": lambda model, adapter, known, tokenizer: lw.Composer(model, [adapter]),
    "load": lambda model, adapter, known, tokenizer: lw.Composer(model, [known]).load("x", adapter),
    "swap": lambda model, adapter, known, tokenizer: lw.Composer(model, [known]).swap([adapter]),
    "a lazy pool": lambda model, adapter, known, tokenizer: first_use(model, adapter, tokenizer),
    "compose": lambda model, adapter, known, tokenizer: lw.compose(
        model, tokenizer, lw.ExpertPool([adapter]), TASK, method="uniform", progress=False
    ),
    "train_adapters": lambda model, adapter, known, tokenizer: lw.train_adapters(
        model, tokenizer, {"t": TASK}, start={"t": adapter}, steps=1, rank=adapter.rank, progress=False
    ),
    "experts": lambda model, adapter, known, tokenizer: lw.experts("mola", model, pool=[adapter], top_k=1),
}
at_every_entrance = pytest.mark.parametrize("entrance", ENTRANCES.values(), ids=ENTRANCES)


@at_every_entrance
@pytest.mark.parametrize(("base", "own"), [("org/other", "org/base"), ("", "org/base"), ("org/base", ""), ("", "")])
def test_another_id_is_taken_with_a_warning_where_names_and_shapes_fit(
    entrance, base, own, model, known, make_adapter, tokenizer
):
    model.name_or_path = own
    with pytest.warns(BaseModelUnverified, match="Only the names and shapes") as caught:
        entrance(model, replace(make_adapter(model, "x"), base_model=base), known, tokenizer)
    said = {str(each.message) for each in caught}
    assert len(said) == 1
    assert all(repr(each) in min(said) for each in (base, own) if each)
    assert "hub.bind" in min(said)


@at_every_entrance
@pytest.mark.parametrize("base", ["org/base", "org/other"])
def test_the_same_weights_or_the_same_id_are_no_cause_for_a_warning(entrance, base, model, known, make_adapter, tokenizer):
    adapter = replace(make_adapter(model, "x"), base_model=base)
    entrance(model, adapter if base == "org/base" else replace(adapter, fingerprint=fingerprint(model)), known, tokenizer)


@at_every_entrance
def test_another_commit_of_the_same_id_is_refused(entrance, model, known, make_adapter, tokenizer):
    model.config._commit_hash = COMMIT
    adapter = replace(make_adapter(model, "x"), base_model="org/base", card={"peft": {"revision": OTHER_COMMIT}})
    with pytest.raises(BaseModelMismatch, match=f"'x'.*{OTHER_COMMIT}.*{COMMIT}.*load the model"):
        entrance(model, adapter, known, tokenizer)


@at_every_entrance
def test_other_weights_are_refused_whatever_the_id(entrance, model, known, make_adapter, tokenizer):
    own = fingerprint(model)
    other = replace(own, samples=tuple(value + 1 for value in own.samples))
    adapter = replace(make_adapter(model, "x"), base_model="org/base", fingerprint=other)
    with pytest.raises(BaseModelMismatch, match=r"'x'.*sampled weights differ"):
        entrance(model, adapter, known, tokenizer)


@at_every_entrance
def test_another_id_and_layers_that_do_not_fit_are_another_base_model(
    entrance, model, known, make_model, make_adapter, tokenizer
):
    wide = make_adapter(make_model("llama", hidden_size=24), "x")
    with pytest.raises(BaseModelMismatch, match=r"'x'.*was made for 'org/wide', and this model is 'org/base'.*load"):
        entrance(model, replace(wide, base_model="org/wide"), known, tokenizer)


def test_a_pool_that_is_opened_when_used_warns_once_for_each_base(model, make_adapter):
    made = {name: replace(make_adapter(model, name), base_model="org/other") for name in "abc"}
    engine = lw.Composer(model, lw.ExpertPool.on_demand(made, made.__getitem__))
    with pytest.warns(BaseModelUnverified) as caught, engine.activate({"a": 1.0, "b": 1.0, "c": 1.0}):
        model(IDS_BT)
    assert len(caught) == 1


def test_a_pool_refuses_two_commits_of_one_base(model, make_adapter):
    made = [
        replace(make_adapter(model, name), card={"peft": {"revision": revision}})
        for name, revision in (("a", "main"), ("b", COMMIT), ("c", OTHER_COMMIT))
    ]
    lw.ExpertPool(made[:2])
    with pytest.raises(BaseModelMismatch, match=r"'b'.*'c'.*the revisions are"):
        lw.ExpertPool(made)


def composed(model, tokenizer, hub, **options):
    options = {"method": "uniform", "progress": False, **options}
    return lw.compose(model, tokenizer, hub, TASK, **options)


def test_a_model_from_a_folder_is_composed_with_the_hubs_adapters_that_fit(
    model, make_model, make_adapter, tokenizer, hub, tmp_path
):
    model.name_or_path = str(tmp_path)
    wide = make_model("llama", hidden_size=24)
    for number, (name, made_for, base) in enumerate(
        [
            ("a", model, "org/base"),
            ("b", model, "org/tuned"),
            ("wide", wide, "org/wide"),
            ("unnamed", model, ""),
            ("wide unnamed", wide, ""),
        ]
    ):
        hub.add(replace(make_adapter(made_for, name, seed=number), base_model=base))
    hub.add(replace(make_adapter(model, "same", seed=9), base_model="org/base", fingerprint=fingerprint(model)))
    with pytest.warns(BaseModelUnverified, match="Only the names and shapes"):
        found = composed(model, tokenizer, hub)
    assert set(found.weights) == {"a", "b", "unnamed", "same"}
    # what was taken is taken: it is merged, used and kept without another word
    again = lw.Composition.from_pretrained(found.save_pretrained(tmp_path / "kept"), model, tokenizer)
    assert again.predict(["a"]) == found.predict(["a"])
    whole = lw.Composer(model, {n: replace(hub[n], fingerprint=fingerprint(model)) for n in found.weights})
    with whole.activate(found.weights), torch.no_grad():
        expected = model(IDS_BT).logits
    with lw.Composer(model, [again.adapter]).activate({"composition": 1.0}), torch.no_grad():
        torch.testing.assert_close(model(IDS_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_k_best_that_fit_are_found_behind_others_that_do_not(model, make_model, make_adapter, tokenizer, hub):
    wide = make_model("llama", hidden_size=24)
    for number in range(9):
        hub.add(replace(make_adapter(wide, f"wide {number}", seed=number), base_model=""))
    for name in "ab":
        hub.add(replace(make_adapter(model, name, seed=ord(name)), base_model=""))
    with pytest.warns(BaseModelUnverified):
        assert set(composed(model, tokenizer, hub, k=2).weights) == {"a", "b"}


def test_a_model_with_an_id_takes_others_where_none_is_known_to_be_for_it(model, make_adapter, tokenizer, hub):
    hub.add(replace(make_adapter(model, "other"), base_model="org/other"))
    with pytest.warns(BaseModelUnverified, match="'other': made for 'org/other', while this model is 'org/base'"):
        assert composed(model, tokenizer, hub).weights == {"other": 1.0}
    hub.add(replace(make_adapter(model, "own", seed=1), base_model="org/base"))
    assert composed(model, tokenizer, hub).weights == {"own": 1.0}


def test_a_composition_of_nothing_is_refused(model, make_model, make_adapter, tokenizer, hub):
    with pytest.raises(EmptyIndex, match=r"no adapters to compose.*hub\.add"):
        composed(model, tokenizer, hub)
    wide = make_model("llama", hidden_size=24)
    for number, base in enumerate(["org/wide", "org/wide", "org/dated"]):
        hub.add(replace(make_adapter(wide, f"adapter {number}", seed=number), base_model=base))
    with pytest.raises(BaseModelMismatch) as caught:
        composed(model, tokenizer, hub)
    message = str(caught.value)
    assert "none of the hub's 3 adapters is for this base model ('org/base')" in message
    assert "2 for 'org/wide', 1 for 'org/dated'" in message
    assert "hub.bind" in message
    assert "--base" in message
    assert "'adapter 0' updates layer" in message
    assert composed(model, tokenizer, hub, method="base").is_base


def test_a_bound_adapter_is_known_by_its_weights(model, make_adapter, tokenizer, hub):
    hub.add(replace(make_adapter(model, "a"), base_model="org/base"))
    hub.bind("a", model)
    model.name_or_path = "/elsewhere"
    assert composed(model, tokenizer, hub).weights == {"a": 1.0}
    lw.Composer(model, hub.pool())


def test_a_kept_composition_warns_where_its_weights_were_not_sampled(model, known, tokenizer, tmp_path):
    folder = lw.compose(model, tokenizer, lw.ExpertPool([known]), TASK, method="uniform").save_pretrained(tmp_path / "kept")
    recipe = json.loads((folder / "composition.json").read_text())
    recipe["fingerprint"]["samples"] = []
    (folder / "composition.json").write_text(json.dumps(recipe))
    lw.Composition.from_pretrained(folder, model, tokenizer)
    model.name_or_path = "org/other"
    with pytest.warns(BaseModelUnverified, match="made for 'org/base', while this model is 'org/other'"):
        lw.Composition.from_pretrained(folder, model, tokenizer)
