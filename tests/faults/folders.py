"""Sound adapter folders of several formats, as file names and bytes: what the mutations start from."""

import io
import json
import struct

import numpy as np
import torch

from loraweave import registry

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}


def safetensors(tensors, metadata=None):
    """The bytes of a file with tensors name -> (dtype, shape, bytes), written by the format's definition alone."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return packed(json.dumps(header).encode(), data)


def packed(header, data):
    return struct.pack("<Q", len(header)) + header + data


def unpacked(raw):
    """The header's text and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def values(*shape, dtype="F32", seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "BF16":
        return dtype, shape, (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return dtype, shape, numbers.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def text(value):
    return json.dumps(value, indent=1).encode()


def config(**fields):
    plain = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": ["q_proj"],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    return text({**plain, **fields})


def _key(number, part):
    return f"base_model.model.model.layers.{number}.self_attn.q_proj.{part}"


def _lora(dtype="F32", rank=2, extra=()):
    tensors = {}
    for number in range(2):
        tensors[_key(number, "lora_A.weight")] = values(rank, 5, dtype=dtype, seed=number)
        tensors[_key(number, "lora_B.weight")] = values(3, rank, dtype=dtype, seed=number + 9)
        for part, size in extra:
            tensors[_key(number, part)] = values(size, dtype=dtype, seed=number + 20)
    return tensors


def _sharded():
    tensors = _lora()
    files, weight_map = {"adapter_config.json": config()}, {}
    for number, name in enumerate(sorted(tensors), start=1):
        shard = f"adapter_model-{number:05d}-of-00004.safetensors"
        files[shard] = safetensors({name: tensors[name]})
        weight_map[name] = shard
    files["adapter_model.safetensors.index.json"] = text({"metadata": {}, "weight_map": weight_map})
    return files


def _loha():
    path = "base_model.model.layers.0.q_proj."
    parts = {"hada_w1_a": (4, 1), "hada_w1_b": (1, 5), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)}
    tensors = {f"{path}{part}": values(*shape, seed=at) for at, (part, shape) in enumerate(parts.items())}
    settings = {"peft_type": "LOHA", "base_model_name_or_path": "org/base", "r": 1, "alpha": 2, "target_modules": ["q_proj"]}
    return {"adapter_config.json": text(settings), "adapter_model.safetensors": safetensors(tensors)}


def _lokr():
    path = "base_model.model.layers.0.q_proj."
    tensors = {f"{path}lokr_w1": values(2, 2, seed=1), f"{path}lokr_w2": values(3, 4, seed=2)}
    settings = {"peft_type": "LOKR", "base_model_name_or_path": "org/base", "r": 1, "alpha": 2, "target_modules": ["q_proj"]}
    return {"adapter_config.json": text(settings), "adapter_model.safetensors": safetensors(tensors)}


def _with_cards():
    card = {"name": "cards", "description": "sorts", "tags": ["words"], "examples": ["a b"], "license": "mit"}
    return {
        "adapter_config.json": config(),
        "adapter_model.safetensors": safetensors(_lora("BF16"), {"format": "pt"}),
        "loraweave.json": text(card),
        "README.md": b"---\nlicense: mit\ntags:\n- a\nbase_model: org/base\n---\n# A card\n",
    }


def _patterns():
    fields = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"layers.[01].self_attn.q_proj": 8}}
    return {"adapter_config.json": config(**fields), "adapter_model.safetensors": safetensors(_lora())}


def _head():
    tensors = {**_lora("F16"), "base_model.model.score.weight": values(2, 5, seed=7)}
    settings = config(task_type="SEQ_CLS", modules_to_save=["score"])
    return {"adapter_config.json": settings, "adapter_model.safetensors": safetensors(tensors)}


def _kohya():
    path = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{path}.lora_down.weight": values(2, 5), f"{path}.lora_up.weight": values(7, 2, seed=1)}
    tensors[f"{path}.alpha"] = "F32", (), struct.pack("<f", 3.0)
    return {"style.safetensors": safetensors(tensors, {"ss_network_module": "networks.lora", "ss_tag_frequency": "{}"})}


def _diffusers():
    path = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    tensors = {f"{path}.lora_A.weight": values(2, 5), f"{path}.lora_B.weight": values(7, 2, seed=1)}
    return {"pytorch_lora_weights.safetensors": safetensors(tensors, {"format": "pt"})}


def _fused():
    path = "base_model.model.transformer.h.0.self_attention.query_key_value"
    tensors = {f"{path}.lora_A.weight": values(4, 5), f"{path}.lora_B.weight": values(6, 2, 1, seed=1)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "enable_lora": [True, False, True], "fan_in_fan_out": True}
    return {"adapter_config.json": text({**settings, "bias": "none"}), "adapter_model.safetensors": safetensors(tensors)}


def _pickle():
    tensors = {
        name: torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(shape).clone()
        for name, (_, shape, content) in _lora().items()
    }
    file = io.BytesIO()
    torch.save(tensors, file)
    return {"adapter_config.json": config(), "adapter_model.bin": file.getvalue()}


def folders():
    """Name -> files of a folder that the hub takes, of the formats that are there; "pickle" only with `allow_pickle`."""
    dora = safetensors(_lora(extra=[("lora_magnitude_vector.weight", 3)]))
    held = {
        "plain": {"adapter_config.json": config(), "adapter_model.safetensors": safetensors(_lora())},
        "cards": _with_cards(),
        "dora": {"adapter_config.json": config(use_dora=True), "adapter_model.safetensors": dora},
        "double": {"adapter_config.json": config(), "adapter_model.safetensors": safetensors(_lora("F64"))},
        "sharded": _sharded(),
        "patterns": _patterns(),
        "head": _head(),
        "loha": _loha(),
        "lokr": _lokr(),
        "kohya": _kohya(),
        "diffusers": _diffusers(),
        "fused": _fused(),
        "pickle": _pickle(),
    }
    extra = {"kohya": "kohya", "diffusers": "diffusers", "fused": "merged_linear"}
    return {name: files for name, files in held.items() if extra.get(name, "peft") in registry.names("formats")}
