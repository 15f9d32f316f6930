"""PEFT's other adapter types: the factors compute what the installed peft computes, whatever the layers' sizes."""

import peft
import pytest
import torch
from foreign_types import free, maker, other, properties_of
from peft_models import TARGETS, gap, tiny

from loraweave.hub.adapter import Adapter

# peft warns about sizes it adjusts and about what it cannot look up for models that exist nowhere
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PATTERNS = {"rank_pattern": {"inner.0": 3}, "alpha_pattern": {"^first": 5, "last": 2}}
EXACT = {
    "vera": free(peft.VeraConfig, 3, r=3),
    "adalora": other(peft.AdaLoraConfig, 4, base=False, init_r=4, target_r=2, total_step=9, lora_alpha=7),
    "loha": free(peft.LoHaConfig, 4, base=False, r=2, alpha=3),
    "loha with patterns": free(peft.LoHaConfig, 9, base=False, r=2, alpha=3, **PATTERNS),
    "lokr": free(peft.LoKrConfig, 8, odd=False, base=False, r=2, alpha=3),
    "lokr in four factors": free(peft.LoKrConfig, 1, odd=False, base=False, r=1, alpha=3, decompose_both=True),
    "lokr with patterns": free(
        peft.LoKrConfig, 4, odd=False, base=False, r=2, alpha=3, alpha_pattern={"inner.0": 1}, rank_pattern={"inner.0": 1}
    ),
    "lokr of primes": free(peft.LoKrConfig, base=False, r=2, alpha=3),
    "ia3 of outputs": other(peft.IA3Config, 0, feedforward_modules=[], init_ia3_weights=False),
}
CUT = {
    "loha of high rank": free(peft.LoHaConfig, base=False, r=5, alpha=3),
    "ia3 of inputs": other(peft.IA3Config, feedforward_modules=TARGETS, init_ia3_weights=False),
}

PROPERTIES = properties_of(EXACT, CUT, shapes=["vera"], written=["loha", "vera", "ia3 of outputs"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return maker(EXACT | CUT, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_a_type_keeps_all_properties(name, request, saved):
    PROPERTIES.walk(request, name, saved=saved)


def test_a_pruned_adalora_is_scaled_by_its_first_rank(tmp_path):
    model = peft.get_peft_model(tiny(), EXACT["adalora"].make())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    masks = {"first": [True, False, True, False], "inner.0": [True] * 4, "last": [False, False, False, True]}
    model.peft_config["default"].rank_pattern = {f"model.{layer}.lora_E.default": mask for layer, mask in masks.items()}
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, {f"{layer}.lora_E.default": mask for layer, mask in masks.items()}
    )
    model.peft_config["default"].rank_pattern = {f"{layer}.lora_E.default": mask for layer, mask in masks.items()}
    model.save_pretrained(tmp_path)
    adapter = Adapter.from_pretrained(tmp_path)
    assert {layer: factors.rank for layer, factors in adapter.layers.items()} == {"first": 2, "inner.0": 4, "last": 1}
    assert gap(model.eval(), adapter) < 1e-5
