"""Folders of mlx-lm, against the formula of its layers: y = W x + s (x a) b."""

import json

import pytest
import torch
from peft_models import Tree
from safetensors.torch import save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

LAYER = "model.layers.0.self_attn.q_proj"
A, B = torch.arange(10.0).reshape(5, 2) / 7, torch.arange(14.0).reshape(2, 7) / 5


def lora(layer, a=A, b=B):
    return {f"{layer}.lora_a": a, f"{layer}.lora_b": b}


def put(folder, *, settings=None, held=None, **fields):
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, **(settings or {})}
    config = {"model": "a/base", "fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(held or lora(LAYER), folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, 20.0), ({"alpha": 16, "scale": 10.0}, 80.0), ({"keys": ["self_attn.q_proj"]}, 20.0)]
)
def test_the_scale_is_the_configs_and_an_older_alpha_multiplies_it(tmp_path, settings, scale):
    adapter = Adapter.from_pretrained(put(tmp_path, settings=settings))
    torch.testing.assert_close(adapter.delta(LAYER), scale * (A @ B).T)
    assert (adapter.base_model, adapter.rank, list(adapter.layers)) == ("a/base", 2, [LAYER])


def test_numbered_checkpoints_lie_beside_the_last_state_which_is_read(tmp_path):
    put(tmp_path)
    save_file(lora(LAYER, 2 * A), tmp_path / "0000100_adapters.safetensors")
    torch.testing.assert_close(Adapter.from_pretrained(tmp_path).delta(LAYER), 20.0 * (A @ B).T)
    earlier = Adapter.from_pretrained(tmp_path / "0000100_adapters.safetensors")
    torch.testing.assert_close(earlier.delta(LAYER), 40.0 * (A @ B).T)
    assert earlier.base_model == "a/base"


def test_an_embedding_is_told_from_a_linear_layer_by_the_base(tmp_path):
    name = "model.embed_tokens"
    put(tmp_path, held=lora(name))
    with pytest.raises(AdapterUnsupported, match=r"embedding.*model=model"):
        Adapter.from_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path, model=Tree({name: nn.Embedding(5, 7)})).layers[name].kind == "embedding"


REFUSED = {
    "DoRA": ({"fine_tune_type": "dora"}, AdapterUnsupported, "'dora'"),
    "an older DoRA": ({"use_dora": True}, AdapterUnsupported, "use_dora True"),
    "another rank": ({"settings": {"rank": 4}}, AdapterCorrupt, "rank 2, but lora_parameters say 4"),
    "no scale": ({"settings": {"scale": None}}, AdapterCorrupt, "scale is None"),
    "an unknown field": ({"settings": {"new": 1}}, AdapterUnsupported, "'new'"),
    "experts": ({"held": lora(LAYER, torch.ones(3, 2, 5), torch.ones(3, 7, 2))}, AdapterUnsupported, "experts"),
    "a magnitude": ({"held": lora(LAYER) | {f"{LAYER}.m": torch.ones(7)}}, AdapterUnsupported, r"q_proj\.m"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_of_mlx_are_refused_by_name(tmp_path, case):
    given, error, named = REFUSED[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put(tmp_path, **given))
