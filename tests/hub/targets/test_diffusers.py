"""diffusers loads both of its layouts, `diffusers` and `kohya`, and makes the latents of the live mixture with them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loraweave as lw
from loraweave.errors import AdapterUnsupported
from loraweave.types import Factors

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WEIGHTS = {"one": 0.7, "two": -0.5}
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv")
# the last names of what is trained in each part
ENDS = {"unet": (*ATTENTION, *RESNETS), "text_encoder": CLIP, "text_encoder_2": CLIP}
TOKENS = torch.tensor([[1, 5, 9, 2, 6, 3]])


def pipeline(kind):
    """A tiny random pipeline of Stable Diffusion 1 or XL, without tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    large = kind == "xl"
    text = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1}
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        use_linear_projection=large,
        cross_attention_dim=32 if large else 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(extra if large else {}),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": diffusers.DDIMScheduler(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
    }
    parts |= {"tokenizer": None}
    if large:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**text))
        made = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made = diffusers.StableDiffusionPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def latents(made):
    """What two steps from fixed noise give, under a prompt that the pipeline's own text encoders read."""
    given = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 1.0}
    given["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    if not hasattr(made, "text_encoder_2"):
        return made(prompt_embeds=made.text_encoder(TOKENS)[0], **given).images
    first = made.text_encoder(TOKENS, output_hidden_states=True).hidden_states[-2]
    second = made.text_encoder_2(TOKENS, output_hidden_states=True)
    both = torch.cat([first, second.hidden_states[-2]], dim=-1)
    return made(prompt_embeds=both, pooled_prompt_embeds=second.text_embeds, **given).images


def parts_of(made):
    found = {part: getattr(made, part, None) for part in ENDS}
    return {part: model for part, model in found.items() if model is not None}


def adapters_for(model, ends):
    """Two adapters of ranks 2 and 3 on the layers with these last names."""
    made = []
    for name, rank in (("one", 2), ("two", 3)):
        layers = {}
        for path, module in model.named_modules():
            if not path.endswith(ends) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            conv = isinstance(module, nn.Conv2d)
            factors = Factors(torch.randn(rank, module.weight[0].numel()), 0.1 * torch.randn(module.weight.shape[0], rank))
            layers[path] = replace(factors, kind="conv", kernel=module.kernel_size) if conv else factors
        made.append(lw.Adapter(name, "tiny", layers))
    return made


@pytest.fixture(scope="module", params=["1", "xl"])
def mixture(request):
    """(kind, latents of the base, latents of the live mixture in all parts, the mixture as one adapter)."""
    torch.manual_seed(1)
    made = pipeline(request.param)
    plain = latents(made)
    layers = {}
    with ExitStack() as live:
        for part, model in parts_of(made).items():
            adapters = adapters_for(model, ENDS[part])
            merged = lw.merge(adapters, list(WEIGHTS.values()), method="linear")
            layers |= {f"{part}.{layer}": factors for layer, factors in merged.layers.items()}
            live.enter_context(lw.Composer(model, lw.ExpertPool(adapters)).activate(WEIGHTS))
        mixed = latents(made)
    return request.param, plain, mixed, lw.Adapter("mixture", "tiny", layers)


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_diffusers_makes_the_latents_of_the_live_mixture(mixture, target, tmp_path):
    kind, plain, mixed, merged = mixture
    report = merged.export(tmp_path / "out", target=target)
    made = pipeline(kind)
    made.load_lora_weights(str(report.folder))
    said = latents(made)
    assert (mixed - plain).abs().max() > 0.05
    torch.testing.assert_close(said, mixed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_every_factor_is_in_the_file_and_read_back(mixture, target, tmp_path):
    _, _, _, merged = mixture
    report = merged.export(tmp_path / "out", target=target)
    stored = load_file(report.folder / "pytorch_lora_weights.safetensors")
    assert len(stored) == len(merged.layers) * (3 if target == "kohya" else 2)
    again = lw.Adapter.from_pretrained(report.folder)
    for layer, factors in merged.layers.items():
        own = layer if layer in again.layers else layer.replace("encoder.layers", "text_model.encoder.layers")
        torch.testing.assert_close(again.delta(own), merged.delta(layer), rtol=1e-6, atol=1e-7)
        assert again.layers[own].kernel == factors.kernel
    assert len(again.layers) == len(merged.layers)


REFUSED = {
    "a model without a name": (
        "diffusers",
        "transformer_blocks.0.attn.to_q",
        "begins with no part of a pipeline",
    ),
    "a transformer": ("kohya", "transformer.transformer_blocks.0.attn.to_q", "is of a transformer, .*target='diffusers'"),
    "an unknown module": (
        "kohya",
        "unet.down_blocks.0.strange",
        "down_blocks_0_strange', which cannot be read back",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_has_no_name_in_the_layout_is_refused(case, tmp_path):
    target, layer, message = REFUSED[case]
    adapter = lw.Adapter("a", "tiny", {layer: Factors(torch.ones(1, 3), torch.ones(2, 1))})
    with pytest.raises(AdapterUnsupported, match=message):
        adapter.export(tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_unet_alone_are_named_as_the_pipelines(tmp_path):
    layer = "mid_block.attentions.0.proj_in"
    adapter = lw.Adapter("a", "tiny", {layer: Factors(torch.ones(1, 3), torch.ones(2, 1))})
    report = adapter.export(tmp_path / "out", target="diffusers")
    stored = load_file(report.folder / "pytorch_lora_weights.safetensors")
    assert set(stored) == {f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"}
