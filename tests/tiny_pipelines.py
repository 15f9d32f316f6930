"""Tiny random pipelines of diffusers, whole but for their weights: they take prompts, and files of their own adapters."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ["red", "blue", "fox", "sea", "ink", "old"]
PROMPTS = ["red fox ink", "old blue sea"]


def _clip(large: bool = False) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    # a word is the merge of its letters, one after another
    letters = sorted({letter for word in WORDS for letter in word})
    merges, vocabulary = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        *firsts, last = word
        pieces = ["".join(firsts[: n + 1]) for n in range(len(firsts))]
        merges += [(left, right[len(left) :]) for left, right in pairwise(pieces)] + [(pieces[-1], f"{last}</w>")]
        vocabulary += [*pieces[1:], f"{word}</w>"]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(vocabulary)}, merges=list(dict.fromkeys(merges)))
    tokenizer.model_max_length = 16
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    return {"tokenizer": tokenizer, "text_encoder": (CLIPTextModelWithProjection if large else CLIPTextModel)(config)}


def _t5(number: int) -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *sorted({letter for word in WORDS for letter in word})]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return {f"tokenizer_{number}": tokenizer, f"text_encoder_{number}": T5EncoderModel(config)}


def _second(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_2": part for name, part in parts.items()}


def pipeline(kind: str) -> Any:
    """A pipeline "sd1", "sdxl", "sd3" or "flux"; of one kind always with the same weights."""
    import diffusers

    torch.manual_seed(0)
    vae = {"block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": 4}
    if kind in ("sd1", "sdxl"):
        large = kind == "sdxl"
        extra: dict[str, Any] = {
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
        # without the cut at 1, which would hide differences
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        shared = {"unet": unet, "vae": diffusers.AutoencoderKL(**vae), "scheduler": scheduler, **_clip()}
        if large:
            made: Any = diffusers.StableDiffusionXLPipeline(**shared, **_second(_clip(large=True)))
        else:
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            made = diffusers.StableDiffusionPipeline(**shared, **none)
    elif kind == "sd3":
        transformer: Any = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        )
        made = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            vae=diffusers.AutoencoderKL(**vae, shift_factor=0.0609, scaling_factor=1.5),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            **_clip(large=True),
            **_second(_clip(large=True)),
            **_t5(3),
        )
    else:
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        made = diffusers.FluxPipeline(
            transformer=transformer,
            vae=diffusers.AutoencoderKL(**vae, shift_factor=0.0609, scaling_factor=1.5),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            **_clip(),
            **_t5(2),
        )
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    made.set_progress_bar_config(disable=True)
    return made


# the last names of what training scripts of diffusers train, and the convolutions that others do
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRAINED = {
    "unet": (*ATTENTION, "proj_in", "proj_out", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"),
    "transformer": (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp", "proj_out"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def save_trained(kind: str, folder: Path, seed: int, rank: int = 2) -> Path:
    """A folder as diffusers' own scripts leave it: LoRA by peft in every part, written by `save_lora_weights`."""
    from peft import LoraConfig, inject_adapter_in_model

    made = pipeline(kind)
    layers = {}
    for part, ends in TRAINED.items():
        model = getattr(made, part, None)
        if model is None or (part == "text_encoder_2" and kind == "flux"):
            continue
        paths = [
            path
            for path, module in model.named_modules()
            if path.endswith(ends) and isinstance(module, nn.Linear | nn.Conv2d)
        ]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), model)
        torch.manual_seed(seed)
        layers[f"{part}_lora_layers"] = {
            re.sub(r"^encoder\.layers", "text_model.encoder.layers", name.replace(".default", "")): torch.randn(
                parameter.shape
            )
            * (0.05 if "lora_B" in name else 1.0)
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
    type(made).save_lora_weights(str(folder), **layers)
    return folder


@torch.no_grad()
def latents(
    made: Any, prompts: Any = PROMPTS[0], steps: int = 2, images: int = 1, dtype: Any = torch.float32, **given: Any
) -> torch.Tensor:
    """What the pipeline makes of prompts, from noise of its own for each place in the batch."""
    count = images * (1 if isinstance(prompts, str) else len(prompts))
    flux = type(made).__name__.startswith("Flux")
    # 8 by 8; in Flux, 16 patches of 4 values in 4 channels
    shape = (16, 16) if flux else (4, 8, 8)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    size = 8 * made.vae_scale_factor if flux else 16
    given = {"guidance_scale": 3.0, **given}
    return made(
        prompts,
        num_inference_steps=steps,
        num_images_per_prompt=images,
        output_type="latent",
        height=size,
        width=size,
        latents=noise.to(dtype),
        **given,
    ).images
