"""Writing a PEFT folder: every scale is 1 because it is already in b, and the folder appears whole or not at all."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.common.checks import entry
from loraweave.common.descent import save_tensors
from loraweave.common.files import replacing, require_replaceable
from loraweave.errors import AdapterUnsupported
from loraweave.hub.formats._card import README, SIDECAR, readme_text, sidecar_text
from loraweave.hub.formats._config import CONFIG, EXPERTS, extension_module
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats._peft_config import HEAD_TASKS, INDEX, PREFIX, WEIGHTS, Key, parse_key
from loraweave.hub.formats._safetensors import MAX_KEY_LENGTH
from loraweave.lowrank.algebra import all_finite
from loraweave.types import Factors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_adapter_file(path: Path) -> bool:
    shard = path.name.startswith("adapter_model-") and path.name.endswith(".safetensors")
    return (path.name in (CONFIG, WEIGHTS, INDEX, README, SIDECAR) or shard) and not path.is_dir()


def write_folder(contents: Contents, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write a PEFT folder as `Peft.write` documents, and return its path."""
    if dtype not in DTYPES:
        raise AdapterUnsupported(f"cannot write {dtype} tensors; choose one of {', '.join(map(str, DTYPES))}")
    target = require_replaceable(folder, lambda path: path.name in contents.files or _is_adapter_file(path))
    experts = {layer: factors for layer, factors in contents.layers.items() if factors.kind == "expert"}
    others = {layer: factors for layer, factors in contents.layers.items() if factors.kind != "expert"}
    stacked, ranks, notes = {}, {}, {}
    if experts:
        what = f"cannot write to {folder}: {next(iter(experts))!r} is an expert of a parameter"
        writer = extension_module("peft_parameters", what, *EXPERTS)
        stacked, ranks, notes = writer.stack_experts(experts)
    config = _config(contents, ranks)
    tensors = _tensors(others, stacked, bool(config["lora_bias"]), dtype) | _heads(contents.heads, dtype)
    layout = _layout(others, notes, bool(config["lora_bias"]))
    texts = {
        CONFIG: json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False),
        SIDECAR: sidecar_text(contents.card, contents.fingerprint, layout),
        README: readme_text(contents.base_model, contents.card, _facts(contents, dtype)),
    }
    with replacing(target) as new:
        save_tensors(tensors, new / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes it readable for its owner alone, unlike every other file of the folder
        (new / WEIGHTS).chmod(0o644)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for name, data in contents.files.items():
            (new / name).write_bytes(data)
    return folder


def _config(contents: Contents, expert_ranks: Mapping[str, int]) -> dict[str, Any]:
    layers = contents.layers
    for layer, factors in layers.items():
        _check_layer(layer, factors)
    wrapped = [layer for layer, factors in layers.items() if _is_wrapped(factors)]
    if not wrapped:
        raise AdapterUnsupported("the adapter has trained biases but no low-rank update, for which PEFT's LoRA has no form")
    dora = [layer for layer in wrapped if layers[layer].magnitude_O is not None]
    if dora and len(dora) < len(wrapped):
        plain = next(layer for layer in wrapped if layers[layer].magnitude_O is None)
        raise AdapterUnsupported(
            f"layer {dora[0]!r} is DoRA and layer {plain!r} is not; PEFT has use_dora for all layers or none"
        )
    with_bias = [layer for layer in wrapped if layers[layer].bias_O is not None]
    _check_bias(layers, with_bias, wrapped, dora)
    wrapped = [layer for layer in wrapped if layers[layer].kind != "expert"]
    ranks = {layer: max(layers[layer].rank, 1) for layer in wrapped} | dict(expert_ranks)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # anchored, since PEFT would otherwise match the name as the end of a longer one
    pattern = {f"^{_escape(layer)}": rank for layer, rank in ranks.items() if rank != common}
    trained = [factors for factors in layers.values() if factors.base_bias_O is not None]
    bias = "none" if not trained else "lora_only" if all(map(_is_wrapped, trained)) else "all"
    known = contents.card.get("peft")
    task, saved = entry(known, "task_type", str), []
    if contents.heads:
        writer = extension_module("peft_heads", f"cannot write the trained head {next(iter(contents.heads))!r}")
        saved, task = writer.saved_modules(contents.heads, layers, known)
    elif task in HEAD_TASKS:
        # PEFT expects a head for it, and could not load the folder
        task = None
    activated = {}
    if contents.invocation:
        require_activatable(contents, "the adapter")
        # only for this task does PEFT look for the tokens in the prompts
        task, activated = "CAUSAL_LM", {"alora_invocation_tokens": list(contents.invocation)}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": contents.base_model or None,
        "revision": entry(known, "revision", str),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _targets(wrapped, [layer for layer in layers if layer not in set(wrapped)]),
        "target_parameters": sorted(expert_ranks) or None,
        "fan_in_fan_out": (entry(known, "fan_in_fan_out", bool) or False) and not expert_ranks,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(dora),
        "lora_bias": bool(with_bias),
        "bias": bias,
        "modules_to_save": saved or None,
        **activated,
    }


def require_activatable(contents: Contents, where: str) -> None:
    """Raise AdapterUnsupported if an adapter with invocation tokens has parts that PEFT cannot switch off before them."""
    if not contents.invocation:
        return
    if contents.heads:
        raise AdapterUnsupported(
            f"{where} has invocation tokens and the trained head {next(iter(contents.heads))!r}, which PEFT applies to "
            "the tokens before them, too: leave the head or the tokens out"
        )
    for layer, factors in contents.layers.items():
        what = {
            "DoRA": factors.magnitude_O is not None,
            "a trained bias of the base": factors.base_bias_O is not None,
            f"of kind {factors.kind!r}": factors.kind != "linear",
        }
        if odd := [name for name, present in what.items() if present]:
            raise AdapterUnsupported(
                f"{where} has invocation tokens, but its layer {layer!r} is {odd[0]}: PEFT has activated LoRA for plain "
                "factors of linear layers"
            )


def _check_layer(layer: str, factors: Factors) -> None:
    where = f"layer {layer!r}"
    if factors.gain_O is not None:
        raise AdapterUnsupported(
            f"{where} has a gain (DoRA bound to a base model, or (IA)3), for which PEFT has no form; write the adapter "
            "as it was before it was bound to a model"
        )
    if factors.magnitude_O is not None and not factors.rank:
        raise AdapterUnsupported(f"{where} is DoRA of rank 0, which PEFT has no form for")
    if factors.kind == "embedding" and (factors.bias_O is not None or factors.base_bias_O is not None):
        raise AdapterUnsupported(f"{where} is an embedding with a bias, for which PEFT has no form")
    if _is_wrapped(factors) and not factors.a_RI.shape[1]:
        raise AdapterUnsupported(f"{where} has a bias of its own but no inputs, so no factors can carry it")
    key = f"{PREFIX}{layer}.lora_A.weight"
    legible = parse_key(key) == Key(layer, "a") and parse_key(f"{PREFIX}{layer}.bias") == Key(layer, "base_bias")
    if not legible or "base_layer" in layer.split(".") or len(key) + 16 > MAX_KEY_LENGTH or not key.isprintable():
        raise AdapterUnsupported(f"{where} has a name that is ambiguous inside a PEFT file")
    for name, tensor in factors.tensors().items():
        if not all_finite(tensor):
            raise AdapterUnsupported(f"{where}: {name} has values that are NaN or infinite")


def _check_bias(layers: Mapping[str, Factors], with_bias: list[str], wrapped: list[str], dora: list[str]) -> None:
    if not with_bias:
        return
    if dora:
        raise AdapterUnsupported(f"layer {with_bias[0]!r} has a bias of its own, which PEFT does not combine with DoRA")
    for layer in wrapped:
        if (kind := layers[layer].kind) in ("embedding", "expert"):
            raise AdapterUnsupported(
                f"layer {with_bias[0]!r} has a bias of its own, which PEFT refuses next to an {kind} ({layer!r})"
            )


def _is_wrapped(factors: Factors) -> bool:
    """Return True if PEFT stores factors for the layer; a trained bias alone is stored without factors."""
    return factors.rank > 0 or factors.bias_O is not None or factors.base_bias_O is None


def _targets(wrapped: list[str], others: list[str]) -> list[str] | str:
    """Return the paths of the wrapped modules, or a regular expression for them if a path could be the end of another.

    PEFT takes a listed name as the end of a module path too: `head` would also match `decoder.head`.
    """
    ends = tuple(f".{layer}" for layer in wrapped)
    if all("." in layer for layer in wrapped) and not any(layer.endswith(ends) for layer in others):
        return sorted(wrapped)
    return "|".join(_escape(layer) for layer in sorted(wrapped))


def _escape(layer: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-" else f"\\{letter}" for letter in layer)


def _tensors(
    layers: Mapping[str, Factors], stacked: Mapping[str, Mapping[str, Tensor]], lora_bias: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    parts = {layer: _parts(factors, lora_bias) for layer, factors in layers.items()}
    return {
        f"{PREFIX}{layer}.{suffix}": _to_stored(tensor, f"layer {layer!r}", dtype)
        for layer, tensors in (*parts.items(), *stacked.items())
        for suffix, tensor in tensors.items()
    }


def _heads(heads: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    for head, tensor in heads.items():
        if not tensor.is_floating_point() or not tensor.numel():
            raise AdapterUnsupported(
                f"head {head!r} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; only floating point tensors that "
                "hold something can be written"
            )
        if not all_finite(tensor):
            raise AdapterUnsupported(f"head {head!r} has values that are NaN or infinite")
        if len(PREFIX) + len(head) > MAX_KEY_LENGTH or not head.isprintable():
            raise AdapterUnsupported(f"head {head[:60]!r} has a name that a PEFT file cannot hold")
    return {f"{PREFIX}{head}": _to_stored(tensor, f"head {head!r}", dtype) for head, tensor in heads.items()}


def _to_stored(tensor: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    # cloned, because safetensors refuses tensors that share storage
    stored = tensor.detach().to("cpu", dtype).contiguous().clone()
    # the values were checked before the conversion
    if dtype != tensor.dtype and not all_finite(stored):
        raise AdapterUnsupported(f"{what} has values that {dtype} cannot hold; write it as torch.float32")
    return stored


def _parts(factors: Factors, lora_bias: bool) -> dict[str, Tensor]:
    if not _is_wrapped(factors):
        assert factors.base_bias_O is not None
        return {"bias": factors.base_bias_O}
    a_RI, b_OR = factors.a_RI, factors.b_OR
    if not factors.rank:
        # PEFT has no rank 0; one rank row of zeros is the same update
        a_RI, b_OR = a_RI.new_zeros(1, a_RI.shape[1]), b_OR.new_zeros(b_OR.shape[0], 1)
    magnitude = {} if factors.magnitude_O is None else {"lora_magnitude_vector": factors.magnitude_O}
    if factors.kind == "embedding":
        return {"lora_embedding_A": a_RI, "lora_embedding_B": b_OR, **magnitude}
    if factors.kind == "conv":
        magnitude = {name: tensor.reshape(1, -1, *(1 for _ in factors.kernel)) for name, tensor in magnitude.items()}
        a_RI = a_RI.reshape(a_RI.shape[0], -1, *factors.kernel)
        b_OR = b_OR.reshape(*b_OR.shape, *(1 for _ in factors.kernel))
    parts = {"lora_A.weight": a_RI, "lora_B.weight": b_OR, **magnitude}
    if lora_bias:
        parts["lora_B.bias"] = b_OR.new_zeros(b_OR.shape[0]) if factors.bias_O is None else factors.bias_O
    if factors.base_bias_O is not None:
        parts["base_layer.bias"] = factors.base_bias_O
    return parts


def _layout(layers: Mapping[str, Factors], expert_notes: Mapping[str, int], lora_bias: bool) -> dict[str, Any]:
    """Return notes on the zeros added for PEFT, from which reading restores the same factors."""
    padded = [layer for layer, factors in layers.items() if lora_bias and _is_wrapped(factors) and factors.bias_O is None]
    empty = {layer: int(factors.a_RI.shape[1]) for layer, factors in layers.items() if not factors.rank}
    layout = (("padded_bias", padded), ("rank_zero", empty), ("expert_ranks", dict(expert_notes)))
    return {name: notes for name, notes in layout if notes}


def _facts(contents: Contents, dtype: torch.dtype) -> dict[str, str]:
    ranks = sorted({factors.rank for factors in contents.layers.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    facts = {
        "Layers": str(len(contents.layers)),
        "Rank": span,
        "Trained heads": ", ".join(sorted(contents.heads)),
        "Files": ", ".join(contents.files),
        "Stored as": str(dtype).removeprefix("torch."),
    }
    return {name: fact for name, fact in facts.items() if fact}
