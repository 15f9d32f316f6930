"""LoRA on fused experts (peft's target_parameters): every expert's layer has peft's update, and peft opens what we write."""

from dataclasses import replace

import peft
import pytest
import torch
from peft_models import Tree, edit, lora, put, save
from tiny_models import random_factors
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._card import SIDECAR
from loraweave.hub.formats.peft import Peft
from loraweave.hub.hub import Hub

EXPERTS, HIDDEN, INNER = 3, 5, 4
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """The parameters of transformers' experts: (E, O, I), or (E, I, O) with `turned`, and with it gpt-oss's flag or not."""

    def __init__(self, turned=False, says_so=True):
        super().__init__()
        first, second = (2 * INNER, HIDDEN), (HIDDEN, INNER)
        shapes = (first[::-1], second[::-1]) if turned else (first, second)
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, *shapes[0]))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, *shapes[1]))
        self.is_transposed = turned and says_so


def model(**layout):
    layers = {f"blocks.{block}.experts": Experts(**layout) for block in range(2)}
    return Tree({**layers, "blocks.0.router": nn.Linear(HIDDEN, EXPERTS)})


def config(**settings):
    settings = {"target_modules": [], "target_parameters": BOTH, "r": 2, "lora_alpha": 3} | settings
    return peft.LoraConfig(**settings)


def updates(opened):
    """{layer: the update of one expert as the parameter has it} of a peft model."""
    found = {}
    for name, module in opened.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            path = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            found |= {f"{path}.{e}": one for e, one in enumerate(module.get_delta_weight("default").detach())}
    return found


def expert(seed, rank=2, outputs=HIDDEN, inputs=INNER):
    return random_factors(seed, rank, outputs, inputs, kind="expert")


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        yield opened


LAYOUTS = {"as linear layers": {}, "gpt-oss": {"turned": True}, "llama 4": {"turned": True, "says_so": False}}
CONFIGS = {
    "both": {},
    "one": {"target_parameters": ["experts.down_proj"]},
    "beside a layer": {"target_modules": ["router"]},
    "patterns": {"rank_pattern": {"0.experts.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 7}, "use_rslora": True},
    "bare names beside a layer": {"target_modules": ["router"], "target_parameters": ["down_proj", "gate_up_proj"]},
    "one block": {"target_parameters": ["blocks.1.experts.down_proj", "0.experts.gate_up_proj", BOTH[1]]},
}


# peft looks for the entries among modules only, before it follows them for parameters too
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONFIGS)
def test_every_experts_layer_has_pefts_update_and_peft_opens_what_is_written(case, layout, tmp_path):
    theirs = updates(save(config(**CONFIGS[case]), tmp_path / "theirs", model(**LAYOUTS[layout])))
    ours = Adapter.from_pretrained(tmp_path / "theirs")
    assert {layer for layer, factors in ours.layers.items() if factors.kind == "expert"} == set(theirs)
    for layer, update in theirs.items():
        own = ours.delta(layer).T if layout == "gpt-oss" else ours.delta(layer)
        torch.testing.assert_close(own, update, atol=1e-6, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = updates(peft.PeftModel.from_pretrained(model(**LAYOUTS[layout]), str(tmp_path / "ours")))
    assert again.keys() == theirs.keys()
    for layer, update in theirs.items():
        torch.testing.assert_close(again[layer], update, atol=1e-6, rtol=1e-5)
    assert Adapter.from_pretrained(tmp_path / "ours").hash == ours.hash


def test_experts_of_other_ranks_and_without_an_update_come_back_as_they_were(tmp_path):
    path = "blocks.0.experts.down_proj"
    ranks = {0: 1, 2: 3, 3: 0}
    ours = Adapter("a", "base", {f"{path}.{e}": expert(e, rank) for e, rank in ranks.items()})
    ours.save_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path).hash == ours.hash
    (tmp_path / SIDECAR).unlink()
    filled = Adapter.from_pretrained(tmp_path)
    for e in range(4):
        expected = ours.delta(f"{path}.{e}") if e in ranks else torch.zeros(HIDDEN, INNER)
        assert torch.equal(filled.delta(f"{path}.{e}"), expected)


def stacked(module="m.experts", rank=2):
    return lora(module, a=torch.randn(EXPERTS * rank, 5), b=torch.randn(3, EXPERTS * rank))


@pytest.mark.parametrize(
    ("targets", "tensors", "message"),
    [
        (["experts.weight"], stacked("m.experts.base_layer") | stacked(), "2 updates of parameters.*name weight there"),
        (["experts.u", "experts.v"], stacked("m.experts.base_layer") | stacked(), "order .* not for 'u'"),
        (["experts.u", "experts.v"], stacked(), "1 updates of parameters.*name u, v there"),
        (["other.weight"], stacked("m.experts.base_layer"), "name none there"),
        (["experts.weight"], stacked("m.attn.base_layer.q"), "name none there"),
        (None, stacked("m.experts.base_layer"), "target_parameters do not name"),
    ],
)
def test_a_file_that_does_not_say_which_parameter_is_meant_is_refused(tmp_path, targets, tensors, message):
    with pytest.raises(AdapterUnsupported, match=message):
        Peft.read(put(tmp_path / "a", tensors, target_parameters=targets))


PLAIN = lora("m.attn.q_proj") | lora("m.attn.v_proj")


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (["q_proj"], ["q_proj", "v_proj"], r"'q_proj', which is the module 'm\.attn\.q_proj' and no parameter"),
        (["attn.q_proj"], ["q_proj", "v_proj"], r"'attn\.q_proj', which is the module"),
        (["q_proj"], None, r"'m\.attn\.v_proj' has an update of one matrix, .* name 'q_proj'"),
        (["down_proj"], r".*_proj", r"'m\.attn\.q_proj' has an update of one matrix, .* name 'down_proj'"),
        (["q_proj.weight"], ["v_proj"], r"'m\.attn\.q_proj' has an update of one matrix, .* name 'weight'"),
        (["q_proj.weight"], ["q_proj", "v_proj"], r"'m\.attn\.q_proj' is one of target_modules, .* name 'weight' of it"),
        (["weight"], ["q_proj", "v_proj"], r"'m\.attn\.q_proj' is one of target_modules, .* name 'weight' of it"),
    ],
)
def test_a_name_that_is_no_parameter_of_several_experts_is_refused(tmp_path, targets, modules, message):
    folder = put(tmp_path / "a", PLAIN, target_parameters=targets, target_modules=modules)
    with pytest.raises(AdapterUnsupported, match=message):
        Peft.read(folder)


def test_layers_of_target_modules_stay_layers_beside_names_of_other_parameters(tmp_path):
    tensors = PLAIN | stacked() | {"base_model.model.m.norm.bias": torch.ones(3)}
    names = {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj", "v_proj"], "bias": "all"}
    found = Peft.read(put(tmp_path / "a", tensors, **names)).layers
    assert {layer: factors.kind for layer, factors in found.items()} == {
        "m.attn.q_proj": "linear",
        "m.attn.v_proj": "linear",
        "m.norm": "linear",
        **{f"m.experts.gate_up_proj.{e}": "expert" for e in range(EXPERTS)},
    }


@pytest.mark.parametrize("parameter", ["down_proj", "weight"])
def test_the_first_expert_alone_comes_back(tmp_path, parameter):
    ours = Adapter("a", "base", {f"m.experts.{parameter}.0": expert(0)})
    ours.save_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path).hash == ours.hash


@pytest.mark.parametrize("change", [{"r": 4}, {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}])
def test_what_peft_does_not_define_for_a_parameter_is_refused(tmp_path, change):
    folder = put(tmp_path / "a", stacked(), target_parameters=["experts.weight"])
    assert len(Peft.read(folder).layers) == EXPERTS
    edit(folder, **change)
    with pytest.raises(AdapterCorrupt, match=r"parameter 'm\.experts\.weight'"):
        Peft.read(folder)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"m.e.w.0": expert(0), "m.e.w.1": expert(1, 2, 7)}, "different sizes"),
        ({"m.e.w": expert(0)}, "has a number"),
        ({"m.e.w.70000": expert(0)}, "at most 65,536 experts"),
        ({"m.e.u.0": expert(0), "m.e.v.0": expert(1)}, "order .* not for 'u'"),
        ({"m.e.w.0": replace(expert(0), bias_O=torch.ones(HIDDEN))}, "two factors only"),
        ({"m.e.w.0": expert(0), "q": random_factors(1, 2, 3, 5, bias_O=torch.ones(3))}, "refuses next to an expert"),
    ],
)
def test_experts_that_peft_has_no_form_for_are_not_written(tmp_path, layers, message):
    with pytest.raises(AdapterUnsupported, match=message):
        Adapter("a", "base", layers).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_hub_keeps_experts_and_names_their_parameters(hub):
    adapter = Adapter("a", "base", {f"m.experts.{p}.{e}": expert(e) for p in ("up_proj", "down_proj") for e in range(2)})
    hub.add(adapter, license="mit")
    assert hub.get("a").hash == adapter.hash
    assert hub.record("a").target_modules == ("down_proj", "up_proj")
