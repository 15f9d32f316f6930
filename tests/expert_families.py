"""Tiny random models with fused experts, one of each layout of transformers, and adapters that peft trained on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rounding import assert_near
from tiny_models import draw_model

from loraweave import registry
from loraweave.hub.adapter import Adapter

WARNINGS = [
    # live, such models need an extension's hook
    pytest.mark.skipif("expert_matrices" not in registry.names("hooks"), reason="no hook runs fused experts"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # tiny models are on no model hub, where some versions of peft look for their vocabulary's size
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2}
SIZES |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "num_experts": 5, "num_local_experts": 5}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    "deepseek_v3": {**LATENT, "n_routed_experts": 5, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    | {"first_k_dense_replace": 1, "n_shared_experts": 1},
}
IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
both = pytest.mark.parametrize("family", ["mixtral", "llama4_text"])


def make(family="mixtral", **settings):
    """A fresh model in eval mode, of weights that matter, the same at every call."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **settings})
    return draw_model(lambda: transformers.AutoModelForCausalLM.from_config(config))


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def near(found, expected):
    # at most eight products after one another in each layer, and the head's, of at most 24 inputs
    assert_near(found, expected, 24 * (8 * SIZES["num_hidden_layers"] + 1))


def save_families(tmp_path_factory):
    """Of a family: peft's models of the adapters "a" (both parameters and a layer) and "b" (one), and both as read."""

    @cache
    def of(family: str):
        theirs, ours = {}, {}
        for seed, (name, targets) in enumerate({"a": EXPERTS, "b": EXPERTS[1:]}.items()):
            layers = ["o_proj"] if name == "a" else []
            config = LoraConfig(r=3 - seed, lora_alpha=5, target_modules=layers, target_parameters=targets)
            model = get_peft_model(make(family), config)
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = 0.3 * torch.randn_like(parameter)
            folder = Path(tmp_path_factory.mktemp(f"{family}-{name}"))
            model.save_pretrained(str(folder), save_embedding_layers=False)
            theirs[name], ours[name] = model.eval(), Adapter.from_pretrained(folder, name=name)
        return theirs, ours

    return of
