"""Files of diffusers: the same update under every name it has had, and the scale from where the file has it."""

import copy
import json

import pytest
import torch
from peft_models import Tree
from safetensors.torch import save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
DOWN, UP = torch.arange(10.0).reshape(2, 5) / 7, torch.arange(14.0).reshape(7, 2) / 5
TO_Q = f"unet.{ATTENTION}.to_q"
NAMES = {
    "by PEFT's names": f"{TO_Q}.lora_A.weight {TO_Q}.lora_B.weight",
    "by its own names": f"{TO_Q}.lora.down.weight {TO_Q}.lora.up.weight",
    "in processors": f"unet.{ATTENTION}.processor.to_q_lora.down.weight unet.{ATTENTION}.processor.to_q_lora.up.weight",
    "of the unet alone": f"{ATTENTION}.processor.to_q_lora.down.weight {ATTENTION}.processor.to_q_lora.up.weight",
    "by kohya's names with dots": f"{TO_Q}.lora_down.weight {TO_Q}.lora_up.weight",
}


def put(folder, held, **metadata):
    save_file(held, folder / "pytorch_lora_weights.safetensors", metadata=metadata or None)
    return folder


def lora(module, down="lora_A", up="lora_B"):
    return {f"{module}.{down}.weight": DOWN, f"{module}.{up}.weight": UP}


@pytest.mark.parametrize("form", NAMES)
def test_the_same_update_is_read_under_every_name_it_has_had(tmp_path, form):
    down, up = NAMES[form].split()
    adapter = Adapter.from_pretrained(put(tmp_path, {down: DOWN, up: UP}))
    assert list(adapter.layers) == [TO_Q]
    torch.testing.assert_close(adapter.delta(TO_Q), UP @ DOWN)


CLIP, FLUX = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "transformer.single_transformer_blocks.3.proj_out"


@pytest.mark.parametrize(
    ("held", "path"),
    [
        (lora(f"unet.{ATTENTION}.processor.to_out_lora", "down", "up"), f"unet.{ATTENTION}.to_out.0"),
        (lora(CLIP, "lora_linear_layer.down", "lora_linear_layer.up"), CLIP),
        (lora(FLUX), FLUX),
    ],
)
def test_a_module_keeps_its_path_below_the_part_of_the_pipeline(tmp_path, held, path):
    assert list(Adapter.from_pretrained(put(tmp_path, held)).layers) == [path]


def test_an_alpha_beside_the_factors_scales_them(tmp_path):
    held = {**lora("transformer.x.to_q"), "transformer.x.to_q.alpha": torch.tensor(3.0)}
    torch.testing.assert_close(Adapter.from_pretrained(put(tmp_path, held)).delta("transformer.x.to_q"), 1.5 * UP @ DOWN)


def test_a_config_in_the_header_scales_each_layer_of_its_part_alone(tmp_path):
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 8},
        "unet.target_modules": ["to_q", "proj_in"],
        "unet.bias": "none",
    }
    paths = (TO_Q, "unet.mid_block.attentions.0.proj_in", "text_encoder.encoder.layers.0.mlp.fc1")
    held = {key: tensor.clone() for path in paths for key, tensor in lora(path).items()}
    adapter = Adapter.from_pretrained(put(tmp_path, held, lora_adapter_metadata=json.dumps(config)))
    for path, scale in zip(paths, (1.5, 4.0, 1.0), strict=True):
        torch.testing.assert_close(adapter.delta(path), scale * UP @ DOWN)


CONFIGS = {
    "another rank": ({"unet.r": 4, "unet.lora_alpha": 3}, AdapterUnsupported, "rank 2, but the config in the header says 4"),
    "DoRA": ({"unet.r": 2, "unet.lora_alpha": 3, "unet.use_dora": True}, AdapterUnsupported, "use_dora"),
    "an unknown field": ({"unet.r": 2, "unet.lora_alpha": 3, "unet.new": 1}, AdapterUnsupported, "unknown field new"),
    "an unknown part": ({"vae.r": 2}, AdapterUnsupported, r"unknown field vae\.r"),
    "no rank": ({"unet.lora_alpha": 2}, AdapterCorrupt, "r is None"),
    "a list": ([1], AdapterCorrupt, "list, not an object"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_in_the_header_that_is_not_understood_is_refused(tmp_path, case):
    config, error, named = CONFIGS[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put(tmp_path, lora(TO_Q), lora_adapter_metadata=json.dumps(config)))


def test_the_base_model_names_the_layers_and_a_part_that_it_is_itself_needs_no_prefix(tmp_path):
    put(tmp_path, lora("unet.mid.to_q"))
    for layer in ("mid.to_q", "unet.mid.to_q"):
        adapter = Adapter.from_pretrained(tmp_path, model=Tree({layer: nn.Linear(5, 7)}))
        assert list(adapter.layers) == [layer]
        assert adapter.fingerprint is not None


def test_a_file_in_a_models_own_names_needs_that_model(tmp_path):
    put(tmp_path, lora("diffusion_model.mid.to_q"))
    with pytest.raises(AdapterUnsupported, match=r"'diffusion_model\.mid\.to_q'.*model=model"):
        Adapter.from_pretrained(tmp_path)
    assert list(Adapter.from_pretrained(tmp_path, model=Tree({"mid.to_q": nn.Linear(5, 7)})).layers) == ["mid.to_q"]


@pytest.mark.parametrize(
    "extra",
    [
        {f"{TO_Q}.lora_magnitude_vector": torch.ones(7)},
        {"unet.conv_in.weight": torch.ones(2)},
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": DOWN.clone()},
    ],
)
def test_a_tensor_that_is_not_part_of_a_lora_is_refused_by_name(tmp_path, extra):
    with pytest.raises(AdapterUnsupported, match=next(iter(extra)).rsplit(".lora_A", 1)[0].replace(".", r"\.")):
        Adapter.from_pretrained(put(tmp_path, {**lora(TO_Q), **extra}))


def test_the_file_that_diffusers_writes_is_read_as_diffusers_applies_it(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import peft

    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 6}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=2, **shape, **kinds).eval()
    x, steps, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 6)
    plain = copy.deepcopy(unet)
    unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False)
    )
    after = unet(x, steps, text).sample.detach()
    unet.save_lora_adapter(tmp_path)
    (written,) = tmp_path.glob("*.safetensors")
    adapter = Adapter.from_pretrained(written, model=plain)
    modules = dict(plain.named_modules())
    with torch.no_grad():
        assert not torch.allclose(plain(x, steps, text).sample, after)
        for path, factors in adapter.layers.items():
            weight = modules[path].weight
            weight += (factors.b_OR @ factors.a_RI).reshape(weight.shape)
        torch.testing.assert_close(plain(x, steps, text).sample, after, rtol=1e-4, atol=1e-5)
