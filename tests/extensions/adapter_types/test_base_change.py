"""PiSSA, OLoRA and MiLoRA saved unconverted: with the base model they mean what peft computes."""

import peft
import pytest
import torch
from peft_models import TARGETS, edit, gap, save, tiny, train

from loraweave.errors import AdapterUnsupported
from loraweave.extensions.adapter_types.formats.base_change import BaseChange
from loraweave.hub.adapter import Adapter
from loraweave.lowrank import algebra

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def saved(folder, init, **options):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=init, **options)
    return save(config, folder)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"last": 2}, "alpha_pattern": {"first": 4}}])
def test_the_update_is_relative_to_the_original_weights(tmp_path, init, options):
    model = saved(tmp_path, init, **options)
    adapter = Adapter.from_pretrained(tmp_path, model=tiny())
    assert gap(model, adapter) < 1e-5
    assert adapter.layers["inner.0"].rank == 6


def test_it_is_what_peft_converts_to(tmp_path):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights="pissa")
    model = peft.get_peft_model(tiny(), config)
    model.save_pretrained(tmp_path / "start")
    train(model)
    model.save_pretrained(tmp_path / "own")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    own = Adapter.from_pretrained(tmp_path / "own", model=tiny())
    converted = Adapter.from_pretrained(tmp_path / "converted")
    for name in TARGETS:
        torch.testing.assert_close(own.delta(name), converted.delta(name), atol=1e-5, rtol=1e-5)


def test_milora_takes_the_smallest_singular_terms_out(tmp_path):
    saved(tmp_path, "gaussian")
    plain = Adapter.from_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights="milora")
    adapter = Adapter.from_pretrained(tmp_path, model=tiny())
    for name in TARGETS:
        weight = tiny().get_submodule(name).weight.detach().double()
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        smallest = (u[:, -3:] * sigma[-3:]) @ vh[-3:]
        wanted = algebra.delta(plain.layers[name]).double() - smallest
        torch.testing.assert_close(adapter.delta(name).double(), wanted, atol=1e-6, rtol=1e-5)


def test_without_the_base_model_it_is_refused_with_the_way_out(tmp_path):
    saved(tmp_path, "pissa")
    with pytest.raises(AdapterUnsupported, match="model=model"):
        Adapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_starts_that_cannot_be_made_again_are_refused(tmp_path, init):
    saved(tmp_path, "pissa")
    edit(tmp_path, init_lora_weights=init)
    with pytest.raises(AdapterUnsupported, match="path_initial_model_for_weight_conversion"):
        Adapter.from_pretrained(tmp_path, model=tiny())


def test_dora_on_a_changed_base_is_refused(tmp_path):
    saved(tmp_path, "pissa", use_dora=True)
    with pytest.raises(AdapterUnsupported, match="plain linear updates"):
        Adapter.from_pretrained(tmp_path, model=tiny())


def test_an_ordinary_lora_is_not_recognised(tmp_path):
    saved(tmp_path, True)
    assert not BaseChange.recognises(tmp_path)
    with pytest.raises(AdapterUnsupported, match="init_lora_weights"):
        BaseChange.read(tmp_path, model=tiny())
