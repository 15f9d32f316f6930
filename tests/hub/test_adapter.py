from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.errors import AdapterNotFound, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors, Fingerprint

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def adapter(name="a", **changes):
    settings = {
        "base_model": "some/base",
        "layers": {Q: factors(0), V: factors(1, rank=4)},
        "fingerprint": Fingerprint("abc", (0.5, -0.25)),
        "card": {"description": "plurals", "tags": ["morphology"]},
    }
    return Adapter(name, **{**settings, **changes})


def test_the_rank_is_the_largest_of_any_layer():
    assert adapter().rank == 4


def test_delta_is_b_times_a_of_that_layer():
    expected = factors(1, rank=4).b_OR.double().numpy() @ factors(1, rank=4).a_RI.double().numpy()
    np.testing.assert_allclose(adapter().delta(V), expected, rtol=1e-5, atol=1e-5)


def test_delta_of_a_layer_that_is_left_alone_is_a_key_error():
    with pytest.raises(KeyError, match="k_proj"):
        adapter().delta("model.layers.0.self_attn.k_proj")


def test_an_adapter_without_layers_is_refused():
    with pytest.raises(AdapterUnsupported, match="'a' has no layers"):
        adapter(layers={})


def test_an_adapter_is_frozen_with_its_mappings():
    one = adapter()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "b"
    with pytest.raises(TypeError):
        one.layers[Q] = factors(9)
    with pytest.raises(TypeError):
        one.card["description"] = "other"


def test_the_mappings_that_made_it_can_change_afterwards():
    layers, card = {Q: factors(0)}, {"description": "plurals"}
    one = adapter(layers=layers, card=card)
    layers.clear()
    card["description"] = "other"
    assert (list(one.layers), one.card["description"]) == ([Q], "plurals")


def test_replace_makes_an_adapter_with_the_hash_of_its_own_content():
    one = adapter()
    before = one.hash
    other = dataclasses.replace(one, layers={Q: factors(5)})
    assert other.hash == adapter(layers={Q: factors(5)}).hash != before


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "b"},
        {"card": {}},
        {"base_model": "other/base"},
        {"fingerprint": None},
        {"layers": {V: factors(1, rank=4), Q: factors(0)}},
    ],
)
def test_names_cards_and_the_order_of_layers_do_not_enter_the_hash(changes):
    assert adapter(**changes).hash == adapter().hash


def test_the_dtype_and_the_memory_layout_do_not_enter_the_hash():
    plain = factors(0)
    exact = Factors(plain.a_RI.bfloat16(), plain.b_OR.bfloat16())
    wide = Factors(exact.a_RI.double().T.contiguous().T, exact.b_OR.float())
    assert adapter(layers={Q: exact}).hash == adapter(layers={Q: wide}).hash


@pytest.mark.parametrize("part", ["a_RI", "b_OR", "gain_O", "bias_O", "magnitude_O", "base_bias_O"])
def test_the_last_bit_of_any_value_changes_the_hash(part):
    vectors = {name: torch.ones(5) for name in ("gain_O", "bias_O", "magnitude_O", "base_bias_O")}
    before = factors(0, **vectors)
    tensor = getattr(before, part).clone()
    last = tensor.reshape(-1)[-1:]
    last.copy_(torch.nextafter(last, torch.tensor([torch.inf])))
    after = dataclasses.replace(before, **{part: tensor})
    assert adapter(layers={Q: after}).hash != adapter(layers={Q: before}).hash


@pytest.mark.parametrize(
    "layers",
    [
        {V: factors(0)},
        {Q: factors(0), V: factors(0)},
        {Q: factors(0, kind="embedding")},
        {Q: factors(0, kind="conv", kernel=(1, 7))},
        {Q: factors(0, bias_O=torch.zeros(5))},
        {Q: Factors(factors(0).a_RI.reshape(7, 3), factors(0).b_OR.reshape(3, 5).repeat(1, 2)[:, :7])},
    ],
)
def test_what_the_values_mean_changes_the_hash(layers):
    assert adapter(layers=layers).hash != adapter(layers={Q: factors(0)}).hash


def test_the_same_vector_as_gain_or_as_bias_is_another_content():
    gain, bias = factors(0, gain_O=torch.ones(5)), factors(0, bias_O=torch.ones(5))
    assert adapter(layers={Q: gain}).hash != adapter(layers={Q: bias}).hash


def test_saved_and_read_it_is_the_same_adapter(tmp_path):
    one = adapter("plural of nouns")
    folder = one.save_pretrained(tmp_path / "saved")
    again = Adapter.from_pretrained(folder)
    assert (again.name, again.base_model, again.fingerprint) == (one.name, one.base_model, one.fingerprint)
    assert again.hash == one.hash
    assert again.card["description"] == "plurals"


def test_the_folder_is_a_plain_peft_folder(tmp_path):
    folder = adapter().save_pretrained(tmp_path / "saved")
    assert (folder / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_name_given_at_reading_counts_before_the_card(tmp_path):
    folder = adapter("from the card").save_pretrained(tmp_path / "saved")
    assert Adapter.from_pretrained(folder, name="mine").name == "mine"


def test_without_a_card_the_folder_gives_the_name(tmp_path):
    folder = adapter().save_pretrained(tmp_path / "plurals")
    for file in ("loraweave.json", "README.md"):
        (folder / file).unlink(missing_ok=True)
    assert Adapter.from_pretrained(f"{folder}/").name == "plurals"


def test_a_folder_that_does_not_exist_is_not_found(tmp_path):
    with pytest.raises(AdapterNotFound, match="no folder"):
        Adapter.from_pretrained(tmp_path / "nothing")


def test_its_repr_has_the_name_and_no_tensors():
    assert repr(adapter()) == "Adapter('a', base_model='some/base', rank=4, layers=2)"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_and_a_pickle_are_the_adapter_again_and_as_frozen(copied):
    one = adapter(heads={"score.weight": torch.ones(2, 7)})
    again = copied(one)
    assert (again.name, again.base_model, again.fingerprint, again.card) == ("a", "some/base", one.fingerprint, one.card)
    assert adapter(layers=again.layers, heads=again.heads).hash == again.hash == one.hash
    assert (list(again.layers), again.form, again.report.layers) == (list(one.layers), one.form, one.report.layers)
    with pytest.raises(TypeError):
        again.layers[Q] = factors(9)


def test_a_deep_copy_shares_no_tensor():
    one = adapter()
    copy.deepcopy(one).layers[Q].a_RI.zero_()
    assert bool(one.layers[Q].a_RI.any())


def test_a_pickle_of_a_part_of_a_tensor_holds_that_part_alone(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter())
        # all of a stored adapter's tensors are parts of one
        stored = hub["a"]
        numbers = sum(tensor.nbytes for factors in stored.layers.values() for tensor in factors.tensors().values())
        assert stored.layers[V].a_RI.untyped_storage().nbytes() == numbers
        factor = stored.layers[V]
        assert len(pickle.dumps(factor)) - len(pickle.dumps(factors(1, rank=4))) < numbers / 4
        assert pickle.loads(pickle.dumps(stored)).hash == stored.hash
