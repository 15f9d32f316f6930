"""PEFT folders, read and written: adapter_config.json and adapter_model.safetensors of a LoRA (Hu et al. 2021)."""

import ctypes
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.common.checks import entry
from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._card import base_model_of_readme, read_card
from loraweave.hub.formats._config import CONFIG, EXPERTS, AdapterConfig, extension_module
from loraweave.hub.formats._contents import Contents, lora_factors
from loraweave.hub.formats._files import present
from loraweave.hub.formats._peft_config import (
    HEAD_TASKS,
    INDEX,
    PICKLE,
    WEIGHTS,
    Part,
    PeftConfig,
    check_all_known,
    parse_lora,
    path_of,
    stored_tensors,
)
from loraweave.hub.formats._peft_write import require_activatable, write_folder
from loraweave.hub.formats._safetensors import gather, require_finite
from loraweave.lowrank.algebra import all_finite, within_range
from loraweave.types import Factors

Parts = dict[Part, Tensor]


class Peft:
    """The reader and writer of PEFT folders. `read` returns the exact factors and heads that PEFT would load, or raises."""

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Return True if the folder has a file of a PEFT adapter, intact or not."""
        return any(present(folder, name) for name in (CONFIG, WEIGHTS, INDEX, PICKLE))

    @staticmethod
    def read(folder: Path, *, assumed: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> Contents:
        """Return the factors of a PEFT folder in fp32 with the scale folded into b, its base model, and its card.

        The layers and their sizes are read from the tensors; target patterns are recorded and never run. If a tensor's rank
        differs from what the config gives the layer, the scale uses the tensor's, with a warning. `card["peft"]` holds the
        fields of the config that `write` writes back and `card["stored_dtype"]` the dtypes in the file. `assumed` replaces
        fields of the config; with `allow_pickle`, torch's safe loader reads a .bin. Raises AdapterCorrupt for damaged files,
        and AdapterUnsupported for contents without an exact form as factors and for an adapter without effect.
        """
        folder = Path(folder)
        config = parse_lora({**AdapterConfig.of(folder).fields, **(assumed or {})}, folder)
        card, fingerprint, layout = read_card(folder)
        stored, dtypes = gather(stored_tensors(folder, allow_pickle=allow_pickle), folder)
        heads, saved = _take_heads(stored, config)
        layers = _layers_of(_parts_of(stored, config), config, layout)
        recorded = dict(config.recorded) | ({"modules_to_save": saved} if saved else {})
        card |= {"peft": recorded, "stored_dtype": dtypes}
        base_model = config.base_model or base_model_of_readme(folder)
        contents = Contents(base_model, layers, fingerprint, card, heads, invocation=config.invocation)
        require_activatable(contents, str(folder))
        contents.require_effect(str(folder), "every update is zero" if config.alpha else "lora_alpha is 0")
        return contents

    @staticmethod
    def write(contents: Contents, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write a PEFT folder that PEFT loads key for key and `read` returns unchanged, and return its path.

        Tensors are stored as `dtype`: float32 (exact), float16 or bfloat16 (rounded). The folder appears whole or not at
        all; an existing one is replaced only when it is empty or holds nothing but an adapter (else AdapterExists). Raises
        AdapterUnsupported for a gain without DoRA's magnitude, and for other contents that PEFT has no form for.
        """
        contents.require_effect(f"cannot write to {folder}")
        return write_folder(contents, Path(folder), dtype=dtype)


def _take_heads(stored: dict[str, Tensor], config: PeftConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Take whole trained modules out of `stored`; return them by parameter of the base, and their names."""
    if not config.modules_to_save and config.task_type not in HEAD_TASKS:
        return {}, []
    what = f"{config.folder}: modules_to_save or task_type {config.task_type!r}, which stand for trained heads"
    reader = extension_module("peft_heads", what)
    heads, names = reader.take_heads(stored, config.modules_to_save, config.task_type, config.bias, config.folder)
    return heads, names


def _parts_of(stored: Mapping[str, Tensor], config: PeftConfig) -> dict[str, Parts]:
    """Map each layer to its tensors by part. Raises AdapterCorrupt for values that are not finite, among others."""
    folder = config.folder
    if not stored:
        raise AdapterUnsupported(f"{folder}: the file holds trained heads but no low-rank update, so it is not a LoRA")
    parts: dict[str, Parts] = defaultdict(dict)
    ordinary = within_range(stored.values())
    for key, parsed in check_all_known(stored, folder, nested=bool(config.target_parameters)).items():
        tensor, where = stored[key], f"{folder}: layer {parsed.layer!r}"
        if parsed.part in parts[parsed.layer]:
            raise AdapterCorrupt(
                f"{folder}: several tensors are the part {parsed.part!r} of layer {parsed.layer!r}, one is {key!r}"
            )
        if not ordinary:
            require_finite(tensor, where, repr(key))
        if tensor.numel() == 0:
            raise AdapterCorrupt(f"{where}: {key!r} has shape {tuple(tensor.shape)} and holds nothing")
        parts[parsed.layer][parsed.part] = tensor
    return parts


def _layers_of(parts: Mapping[str, Parts], config: PeftConfig, layout: Mapping[str, Any]) -> dict[str, Factors]:
    # each expert of a fused parameter counts as a layer
    what = f"{config.folder}: target_parameters"
    reader = extension_module("peft_parameters", what, *EXPERTS) if config.target_parameters else None
    experts = {} if reader is None else reader.experts_of(parts, config)
    unscaled: dict[str, Factors] = {}
    for layer, held in parts.items():
        unscaled |= experts[layer] if layer in experts else {layer: _factors(layer, held, config)}
    ranks = {path_of(layer, factors): factors.rank for layer, factors in unscaled.items() if factors.rank}
    scales = config.scales(ranks)
    _warn_of_other_ranks(ranks, scales, config)
    scaled = {
        layer: _scale(layer, factors, scales.get(path_of(layer, factors), 1.0), config)
        for layer, factors in unscaled.items()
    }
    layers = {layer: _undo_layout(layer, factors, layout) for layer, factors in scaled.items()}
    return layers if reader is None else dict(reader.unpad(layers, layout))


def _warn_of_other_ranks(found: Mapping[str, int], scales: Mapping[str, float], config: PeftConfig) -> None:
    expected = config.ranks(found)
    if others := [layer for layer, rank in found.items() if rank != expected[layer]]:
        layer = others[0]
        warnings.warn(
            f"{config.folder}: {len(others)} of {len(found)} layers have another rank in the file than in "
            f"adapter_config.json, the first {layer!r} with {found[layer]} and {expected[layer]} (r={config.rank}, "
            f"{len(config.rank_pattern)} entries in rank_pattern); the file's is taken, in the scale too, which is "
            f"{scales[layer]:.6g} for that layer. If training scaled by the config's, correct lora_alpha",
            UserWarning,
            stacklevel=2,
        )


def _factors(layer: str, held: Parts, config: PeftConfig) -> Factors:
    """Return the factors of one layer before scaling; a trained bias alone gives rank 0."""
    where = f"{config.folder}: layer {layer!r}"
    if set(held) == {"base_bias"}:
        bias_O = held["base_bias"]
        _vector(bias_O, where, "the trained bias", bias_O.numel())
        # the file does not say how many inputs the layer has
        return Factors(torch.zeros(0, 0), torch.zeros(bias_O.shape[0], 0), base_bias_O=bias_O)
    embedding = bool({"embedding_a", "embedding_b"} & set(held))
    a, b = (held.get("embedding_a"), held.get("embedding_b")) if embedding else (held.get("a"), held.get("b"))
    if a is None or b is None or (embedding and {"a", "b"} & set(held)):
        raise AdapterCorrupt(f"{where} has {', '.join(sorted(held))}, not the two factors A and B of one update")
    factors = lora_factors(a, b, embedding, where)
    _check_flags(held, factors, config, where)
    if held.keys() <= {"a", "b"}:
        return factors
    size, magnitude = factors.b_OR.shape[0], held.get("magnitude")
    # PEFT stores DoRA's magnitude as (1, O, 1, ...) for a convolution
    if (
        magnitude is not None
        and factors.kind == "conv"
        and tuple(magnitude.shape) == (1, size, *(1 for _ in factors.kernel))
    ):
        magnitude = magnitude.flatten()
    return replace(
        factors,
        bias_O=_vector(held.get("bias"), where, "lora_B's bias", size),
        magnitude_O=_vector(magnitude, where, "DoRA's magnitude", size),
        base_bias_O=_vector(held.get("base_bias"), where, "the trained bias", size),
    )


def _check_flags(held: Parts, factors: Factors, config: PeftConfig, where: str) -> None:
    """Check that the file has what the config's flags announce, and nothing that PEFT would ignore silently."""
    if config.lora_bias and factors.kind == "embedding":
        raise AdapterUnsupported(f"{where} is an embedding with lora_bias, which PEFT does not define")
    for part, name, flag in (("magnitude", "use_dora", config.use_dora), ("bias", "lora_bias", config.lora_bias)):
        if (part in held) != flag:
            has = "has" if part in held else "lacks"
            raise AdapterCorrupt(f"{where} {has} the tensor {part!r}, but the config says {name}={str(flag).lower()}")


def _vector(tensor: Tensor | None, where: str, what: str, size: int) -> Tensor | None:
    if tensor is not None and tuple(tensor.shape) != (size,):
        raise AdapterCorrupt(f"{where}: {what} has shape {tuple(tensor.shape)}, not ({size},)")
    return tensor


def _scale(layer: str, factors: Factors, scale: float, config: PeftConfig) -> Factors:
    """Return the factors with b and bias multiplied by the scale, in float64 and then rounded once to fp32."""
    if scale == 1:
        return factors
    b_OR, bias_O = _times(factors.b_OR, scale), None if factors.bias_O is None else _times(factors.bias_O, scale)
    for tensor in (b_OR, bias_O):
        if tensor is not None and not all_finite(tensor):
            raise AdapterCorrupt(f"{config.folder}: layer {layer!r}: the scale {scale:.6g} takes B beyond what fp32 holds")
    return replace(factors, b_OR=b_OR, bias_O=bias_O)


def _times(tensor: Tensor, scale: float) -> Tensor:
    # a product of two fp32 numbers is exact in float64, so fp32 rounds it to the same number
    return tensor * scale if ctypes.c_float(scale).value == scale else (tensor.double() * scale).float()


def _undo_layout(layer: str, factors: Factors, layout: Mapping[str, Any]) -> Factors:
    """Undo what our writer added for PEFT: zeros only, so that the notes in a foreign file cannot change a value."""
    padded = layer in (entry(layout, "padded_bias", list) or ())
    if padded and factors.bias_O is not None and not bool(factors.bias_O.any()):
        factors = replace(factors, bias_O=None)
    size = (entry(layout, "rank_zero", dict) or {}).get(layer)
    if type(size) is int and 0 <= size < 2**31 and not bool(factors.a_RI.any()) and not bool(factors.b_OR.any()):
        inputs = size if factors.rank == 0 else factors.a_RI.shape[1]
        factors = replace(factors, a_RI=torch.zeros(0, inputs), b_OR=factors.b_OR[:, :0])
    return factors
