"""Files of sd-scripts and LyCORIS: names against diffusers' own, values against the formula written out."""

import json
from pathlib import Path

import pytest
import torch
from peft_models import Tree
from safetensors.torch import save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.extensions.adapter_types.formats.kohya import Kohya
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub

GOLDEN = json.loads(Path(__file__).with_name("kohya_names.json").read_text(encoding="utf-8"))["names"]
TO_Q = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
TO_Q_PATH = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_up_blocks_1_resnets_2_conv1"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(module, *, num_in=5, num_out=7, rank=2, alpha=3.0, kernel=()):
    """LoRA's tensors of a module; 1s for the kernel of the second convolution."""
    held = {
        f"{module}.lora_down.weight": random(rank, num_in, *kernel),
        f"{module}.lora_up.weight": random(num_out, rank, *(1 for _ in kernel)),
    }
    return held | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)})


def put(path, *tables, metadata=None):
    save_file({key: tensor for table in tables for key, tensor in table.items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("alpha", [3.0, 0.5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_update_is_alpha_over_rank_times_up_down_and_without_alpha_unscaled(tmp_path, alpha, dtype):
    held = {key: tensor.to(dtype) for key, tensor in lora(TO_Q, alpha=alpha).items()}
    adapter = Adapter.from_pretrained(put(tmp_path / "style.safetensors", held))
    expected = held[f"{TO_Q}.lora_up.weight"].double() @ held[f"{TO_Q}.lora_down.weight"].double()
    expected *= 1.0 if alpha is None else alpha / 2
    torch.testing.assert_close(adapter.delta(TO_Q_PATH).double(), expected, rtol=1e-5, atol=1e-6)
    assert (adapter.name, adapter.base_model, list(adapter.layers)) == ("style", "", [TO_Q_PATH])


TEXT = "text_model.encoder.layers"
KNOWN = {
    "lora_te_text_model_encoder_layers_11_self_attn_q_proj": f"text_encoder.{TEXT}.11.self_attn.q_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"text_encoder.{TEXT}.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": f"text_encoder_2.{TEXT}.31.mlp.fc2",
    "lora_unet_mid_block_resnets_0_time_emb_proj": "unet.mid_block.resnets.0.time_emb_proj",
    "lora_unet_up_blocks_3_attentions_2_proj_out": "unet.up_blocks.3.attentions.2.proj_out",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "unet.down_blocks.2.downsamplers.0.conv",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_transformer_single_transformer_blocks_9_attn_to_k": "transformer.single_transformer_blocks.9.attn.to_k",
}
# the original names of the unet mean what diffusers says
KNOWN |= {f"lora_unet_{name}": path for name, path in GOLDEN.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_of_a_known_architecture_is_looked_up(name):
    assert Kohya.place(name, None, "file").targets == (KNOWN[name],)


def test_every_layer_of_diffusers_own_models_is_found_under_one_path():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        levels = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), down_block_types=levels[0], up_block_types=levels[1], cross_attention_dim=8
        )
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=2)
    for component, model in (("unet", unet), ("transformer", flux)):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        found = {name: Kohya.place(f"lora_unet_{name.replace('.', '_')}", None, "f").targets for name in names}
        assert found == {name: (f"{component}.{name}",) for name in names}


def test_flux_projections_that_its_authors_fuse_are_divided_among_the_layers_of_diffusers(tmp_path):
    fused = "lora_unet_double_blocks_3_img_attn_qkv"
    beside = "lora_unet_single_blocks_7_linear1"
    held = lora(fused, num_out=3 * 4) | lora(beside, num_out=7 * 4)
    adapter = Adapter.from_pretrained(put(tmp_path / "flux.safetensors", held))
    up, down = held[f"{fused}.lora_up.weight"], held[f"{fused}.lora_down.weight"]
    for place, part in enumerate("qkv"):
        delta = adapter.delta(f"transformer.transformer_blocks.3.attn.to_{part}")
        torch.testing.assert_close(delta, 1.5 * up[4 * place : 4 * place + 4] @ down)
    shapes = {path.rsplit(".", 1)[-1]: factors.b_OR.shape[0] for path, factors in adapter.layers.items() if "single" in path}
    assert shapes == {"to_q": 4, "to_k": 4, "to_v": 4, "proj_mlp": 16}


def test_a_fused_projection_that_does_not_divide_is_refused(tmp_path):
    path = put(tmp_path / "a.safetensors", lora("lora_unet_double_blocks_3_img_attn_qkv", num_out=10))
    with pytest.raises(AdapterUnsupported, match=r"10 outputs, which do not divide into 1 x \(1 : 1 : 1\)"):
        Adapter.from_pretrained(path)


def test_a_convolution_is_read_with_its_kernel(tmp_path):
    held = lora(CONV, kernel=(3, 3))
    factors = Adapter.from_pretrained(put(tmp_path / "a.safetensors", held)).layers["unet.up_blocks.1.resnets.2.conv1"]
    assert (factors.kind, factors.kernel, tuple(factors.a_RI.shape)) == ("conv", (3, 3), (2, 45))


def test_three_convolutions_in_a_row_are_the_update_of_one(tmp_path):
    held = {
        f"{CONV}.lora_down.weight": random(2, 5, 1, 1),
        f"{CONV}.lora_mid.weight": random(2, 2, 3, 3),
        f"{CONV}.lora_up.weight": random(7, 2, 1, 1),
    }
    factors = Adapter.from_pretrained(put(tmp_path / "a.safetensors", held)).layers["unet.up_blocks.1.resnets.2.conv1"]
    x = random(1, 5, 6, 6).double()
    conv = nn.functional.conv2d
    down, mid, up = (held[f"{CONV}.lora_{part}.weight"].double() for part in ("down", "mid", "up"))
    expected = conv(conv(conv(x, down), mid, padding=1), up)
    weight = (factors.b_OR.double() @ factors.a_RI.double()).reshape(7, 5, 3, 3)
    torch.testing.assert_close(conv(x, weight, padding=1), expected, rtol=1e-5, atol=1e-5)


def test_loha_and_lokr_become_factors_by_their_formulas(tmp_path):
    loha = {f"{TO_Q}.hada_w{n}_{s}": random(*shape, seed=n) for n in (1, 2) for s, shape in (("a", (7, 2)), ("b", (2, 5)))}
    other = TO_Q.replace("attn1", "attn2")
    lokr = {f"{other}.lokr_w1": random(2, 3), f"{other}.lokr_w2_a": random(4, 2), f"{other}.lokr_w2_b": random(2, 3)}
    whole = TO_Q.replace("to_q", "to_k")
    exact = {f"{whole}.lokr_w1": random(2, 3), f"{whole}.lokr_w2": random(4, 3)}
    alphas = {f"{name}.alpha": torch.tensor(3.0) for name in (TO_Q, other, whole)}
    adapter = Adapter.from_pretrained(put(tmp_path / "a.safetensors", loha, lokr, exact, alphas))
    hada = [loha[f"{TO_Q}.hada_w{n}_a"] @ loha[f"{TO_Q}.hada_w{n}_b"] for n in (1, 2)]
    torch.testing.assert_close(adapter.delta(TO_Q_PATH), 1.5 * hada[0] * hada[1], rtol=1e-4, atol=1e-5)
    second = lokr[f"{other}.lokr_w2_a"] @ lokr[f"{other}.lokr_w2_b"]
    kron = 1.5 * torch.kron(lokr[f"{other}.lokr_w1"], second)
    torch.testing.assert_close(adapter.delta(TO_Q_PATH.replace("attn1", "attn2")), kron, rtol=1e-4, atol=1e-5)
    # without a rank there is nothing that alpha could be divided by
    kron = torch.kron(exact[f"{whole}.lokr_w1"], exact[f"{whole}.lokr_w2"])
    torch.testing.assert_close(adapter.delta(TO_Q_PATH.replace("to_q", "to_k")), kron, rtol=1e-4, atol=1e-5)


def test_loha_of_a_convolution_needs_the_base_for_its_kernel(tmp_path):
    held = {f"{CONV}.hada_w{n}_{s}": random(*shape, seed=n) for n in (1, 2) for s, shape in (("a", (7, 1)), ("b", (1, 45)))}
    path = put(tmp_path / "a.safetensors", held)
    with pytest.raises(AdapterUnsupported, match=r"convolution.*model=model"):
        Adapter.from_pretrained(path)
    model = Tree({"up_blocks.1.resnets.2.conv1": nn.Conv2d(5, 7, 3)})
    factors = Adapter.from_pretrained(path, model=model).layers["up_blocks.1.resnets.2.conv1"]
    assert (factors.kind, factors.kernel, factors.rank) == ("conv", (3, 3), 1)


def test_the_base_model_says_what_underscores_mean_in_an_architecture_that_no_table_has(tmp_path):
    path = put(tmp_path / "a.safetensors", lora("lora_unet_my_blocks_0_cross_attn_q_proj"))
    with pytest.raises(AdapterUnsupported, match=r"my_blocks_0_cross_attn_q_proj.*model=model"):
        Adapter.from_pretrained(path)
    for layer in ("my_blocks.0.cross_attn.q_proj", "unet.my_blocks.0.cross_attn.q_proj"):
        assert list(Adapter.from_pretrained(path, model=Tree({layer: nn.Linear(5, 7)})).layers) == [layer]


def test_a_name_that_means_two_layers_of_the_base_is_refused_with_both(tmp_path):
    path = put(tmp_path / "a.safetensors", lora("lora_unet_a_b"))
    with pytest.raises(AdapterUnsupported, match=r"can mean 'a\.b' or 'a_b'"):
        Adapter.from_pretrained(path, model=Tree({"a.b": nn.Linear(5, 7), "a_b": nn.Linear(5, 7)}))


def test_a_text_encoder_is_found_without_the_step_that_transformers_took_out(tmp_path):
    path = put(tmp_path / "a.safetensors", lora("lora_te_text_model_encoder_layers_0_mlp_fc1"))
    adapter = Adapter.from_pretrained(path, model=Tree({"encoder.layers.0.mlp.fc1": nn.Linear(5, 7)}))
    assert list(adapter.layers) == ["encoder.layers.0.mlp.fc1"]


@pytest.mark.parametrize("layer", [nn.Linear(6, 7), nn.Linear(5, 8), nn.Conv2d(5, 7, 3)])
def test_another_base_is_refused_with_both_sizes(tmp_path, layer):
    path = put(tmp_path / "a.safetensors", lora(TO_Q))
    with pytest.raises(LayerMismatch, match=r"\(7, 5\)"):
        Adapter.from_pretrained(path, model=Tree({TO_Q_PATH: layer}))
    with pytest.raises(LayerMismatch, match="does not have"):
        Adapter.from_pretrained(path, model=Tree({"other": layer}))


BROKEN = {
    "no up": ({f"{TO_Q}.lora_down.weight": torch.ones(2, 5)}, AdapterCorrupt, "not the parts of one update"),
    "another rank": ({**lora(TO_Q), f"{TO_Q}.lora_up.weight": torch.ones(7, 3)}, AdapterCorrupt, r"\(7, 3\)"),
    "a kernel without bound": (
        {
            f"{CONV}.lora_down.weight": torch.ones(1, 5, 1, 1),
            f"{CONV}.lora_mid.weight": torch.ones(1, 1, 900, 900),
            f"{CONV}.lora_up.weight": torch.ones(7, 1, 1, 1),
        },
        AdapterUnsupported,
        r"kernel of \(900, 900\)",
    ),
    "NaN": ({**lora(TO_Q), f"{TO_Q}.alpha": torch.tensor(float("nan"))}, AdapterCorrupt, "NaN"),
    "two alphas": ({**lora(TO_Q), f"{TO_Q}.alpha": torch.ones(2)}, AdapterCorrupt, "not one number"),
    "no effect": (lora(TO_Q, alpha=0.0), AdapterUnsupported, "without effect"),
    "weight decomposition": ({**lora(TO_Q), f"{TO_Q}.dora_scale": torch.ones(7, 1)}, AdapterUnsupported, "dora_scale"),
    "a whole difference": ({**lora(TO_Q), f"{TO_Q}.diff": torch.ones(7, 5)}, AdapterUnsupported, "whole change"),
    "an unknown tensor": ({**lora(TO_Q), f"{TO_Q}.lora_new.weight": torch.ones(1)}, AdapterUnsupported, "lora_new"),
    "an unknown prefix": (lora("lora_prior_x_to_q"), AdapterUnsupported, "none of the known prefixes"),
    "a third text encoder": (lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), AdapterUnsupported, "lora_te3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_ambiguous_and_damaged_files_are_refused_by_name(tmp_path, case):
    held, error, named = BROKEN[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put(tmp_path / "a.safetensors", held))


def test_a_folder_with_one_such_file_is_read_and_several_are_listed(tmp_path):
    put(tmp_path / "one.safetensors", lora(TO_Q), metadata={"ss_base_model_version": "sd_v1", "ss_network_dim": "2"})
    (tmp_path / "README.md").write_text("---\nbase_model: runwayml/stable-diffusion-v1-5\nlicense: mit\n---\n")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    adapter = Adapter.from_pretrained(tmp_path)
    assert (adapter.base_model, adapter.card["license"]) == ("runwayml/stable-diffusion-v1-5", "mit")
    assert adapter.card["file_metadata"] == {"ss_base_model_version": "sd_v1", "ss_network_dim": "2"}
    put(tmp_path / "two.safetensors", lora(TO_Q))
    with pytest.raises(AdapterUnsupported, match=r"one\.safetensors, two\.safetensors; give the path of one"):
        Adapter.from_pretrained(tmp_path)
    assert Adapter.from_pretrained(tmp_path / "two.safetensors").hash == adapter.hash


def test_a_file_whose_names_say_nothing_is_refused_with_the_first_of_them(tmp_path):
    save_file({"a_000": torch.ones(2, 5), "b_000": torch.ones(7, 2)}, tmp_path / "lora_rank2.safetensors")
    for source in (tmp_path, tmp_path / "lora_rank2.safetensors"):
        with pytest.raises(AdapterUnsupported, match=r"no known layout.*kohya.*'a_000', 'b_000'"):
            Adapter.from_pretrained(source)


def test_a_damaged_file_is_named_as_one(tmp_path):
    path = put(tmp_path / "a.safetensors", lora(TO_Q))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterCorrupt, match=r"a\.safetensors is not an intact safetensors file"):
        Adapter.from_pretrained(path)


def test_the_hub_stores_such_a_file_and_peft_reads_what_is_written_of_it(tmp_path):
    path = put(tmp_path / "style.safetensors", lora(TO_Q))
    with Hub(tmp_path / "hub") as hub:
        record = hub.add(path, base_model="runwayml/stable-diffusion-v1-5")
        assert (record.name, record.rank, record.base_model) == ("style", 2, "runwayml/stable-diffusion-v1-5")
        assert Adapter.from_pretrained(hub["style"].save_pretrained(tmp_path / "peft")).hash == record.hash
