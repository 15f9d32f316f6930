"""Mixtures to export: of two random adapters for small models of several architectures, and of the stored pool's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import loraweave as lw
from loraweave.types import Factors

POOL = Path(__file__).parents[1] / "examples" / "pool"
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28, 18, 28, 45, 9, 4, 5]]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 128}
# by transformers' model type: what differs from its defaults, so that heads are not hidden size / number of heads
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": GEMMA,
    # one of six layers looks at everything, the others through a window
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# mixtures of experts, whose fused parameters have updates too
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 32, **EXPERTS},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
}


@dataclass(frozen=True)
class Mixture:
    """A model, what adapters with weights make of it, the same as one adapter, and prompts."""

    model: Any
    adapters: list[lw.Adapter]
    weights: dict[str, float]
    prompts: list[list[int]]

    @property
    def merged(self) -> lw.Adapter:
        return lw.merge(self.adapters, list(self.weights.values()), method="linear")

    def base(self) -> list[torch.Tensor]:
        """Log-probabilities of the token after each prompt, by the base alone."""
        with torch.no_grad():
            return [torch.log_softmax(self.model(torch.tensor([prompt])).logits[0, -1], -1) for prompt in self.prompts]

    def live(self) -> list[torch.Tensor]:
        """The same by the live mixture."""
        with lw.Composer(self.model, lw.ExpertPool(self.adapters)).activate(self.weights):
            return self.base()


def tiny_mixture(family: str, *, everywhere: bool = False, **sizes: int) -> Mixture:
    """Two adapters of ranks 2 and 3 on all layers of the blocks; with `everywhere` on both embeddings, untied, too."""
    torch.manual_seed(0)
    options = {
        **SIZES,
        **{**FAMILIES, **MIXTURES}[family],
        **sizes,
        **({"tie_word_embeddings": False} if everywhere else {}),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger than at the start of training, so that attention looks at something
            parameter.copy_(0.1 * torch.randn_like(parameter) if "norm" in name else 0.15 * torch.randn_like(parameter))
            if "norm" in name and name.endswith("weight") and not family.startswith("gemma"):
                parameter += 1
    model.name_or_path = f"tiny/{family}"
    adapters = [_adapter(model, rank, everywhere) for rank in (2, 3)]
    return Mixture(model, adapters, {"rank 2": 0.7, "rank 3": -0.4}, PROMPTS)


def _adapter(model: nn.Module, rank: int, everywhere: bool) -> lw.Adapter:
    layers = {}
    for name, module in model.named_modules():
        for part, weight in module.named_parameters(name, recurse=False):
            if weight.ndim == 3:
                for expert, (num_out, num_in) in enumerate([weight.shape[1:]] * len(weight)):
                    factors = Factors(torch.randn(rank, num_in), 0.1 * torch.randn(num_out, rank), kind="expert")
                    layers[f"{part}.{expert}"] = factors
        linear = isinstance(module, nn.Linear) and (everywhere or name != "lm_head")
        if linear or (everywhere and isinstance(module, nn.Embedding)):
            num_out, num_in = module.weight.shape if linear else module.weight.T.shape
            factors = Factors(torch.randn(rank, num_in), 0.1 * torch.randn(num_out, rank))
            layers[name] = factors if linear else Factors(factors.a_RI, factors.b_OR, kind="embedding")
    return lw.Adapter(f"rank {rank}", model.name_or_path, layers)


def pool_mixture() -> Mixture:
    """Three adapters of the example pool on the embedded base, one of them with a negative weight."""
    model, tokenizer = lw.load_base()
    weights = {"passive": 0.7, "negation": -0.4, "plural": 0.5}
    adapters = [lw.Adapter.from_pretrained(POOL / name, name=name) for name in weights]
    texts = ["Rewrite the sentence: The cat ate the fish.", "The capital of France is"]
    return Mixture(model, adapters, weights, [tokenizer(text)["input_ids"] for text in texts])
