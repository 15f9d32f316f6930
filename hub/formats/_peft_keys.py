"""The tensor names of a PEFT file, of every age: which layer and which part of its update each one is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraweave.errors import AdapterCorrupt, AdapterUnsupported

PREFIX = "base_model.model."

Part = Literal["a", "b", "bias", "embedding_a", "embedding_b", "magnitude", "base_bias"]

_MATRICES: dict[str, Part] = {"lora_A": "a", "lora_B": "b"}
_PARAMETERS: dict[str, Part] = {
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
}

# parts of keys that belong to features without an exact form as factors
_FOREIGN = {
    "modules_to_save": "a trained copy of a module that the config's modules_to_save does not list",
    "token_adapter": "trained rows of the embedding (trainable_token_indices)",
    "trainable_tokens_delta": "trained rows of the embedding (trainable_token_indices)",
    "lora_diag": "KaSA's singular values",
    "lora_E": "AdaLoRA's singular values",
    "lora_velora_embed": "VeLoRA's projection",
    "lora_monteclora_sampler": "Monteclora's sampler",
}
# modules that PEFT saves whole next to the factors: its names for embeddings and heads, and the layer below an embedding's
_WHOLE = {
    "base_layer",
    "embed_tokens",
    "lm_head",
    "wte",
    "shared",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "classifier",
    "score",
}
_KOHYA = ("lora_down", "lora_up")


@dataclass(frozen=True)
class Key:
    """One tensor name taken apart; `adapter` is the adapter's name inside the key, empty where there is none."""

    layer: str
    part: Part
    adapter: str = ""


def parse_key(key: str) -> Key | None:
    """The layer and part that a tensor name means, or None for a name that is none of PEFT's LoRA.

    The prefix `base_model.model.` may be missing, there once, or doubled (a PeftModel wrapped twice).
    """
    pieces = without_prefix(key).split(".")
    found = _lora_part(pieces) or _bias(pieces)
    if found is None or not found.layer or "" in pieces:
        return None
    return found


def without_prefix(key: str) -> str:
    """The name below the base model."""
    while key.startswith(PREFIX):
        key = key[len(PREFIX) :]
    return key


def check_all_known(keys: Iterable[str], folder: Path) -> dict[str, Key]:
    """Every name taken apart. Raises AdapterUnsupported for a known foreign feature, AdapterCorrupt for unknown names."""
    parsed: dict[str, Key] = {}
    unknown: list[str] = []
    for key in keys:
        found = parse_key(key)
        _refuse_foreign(key, found, folder)
        if found is None:
            unknown.append(key)
        else:
            parsed[key] = found
    if unknown:
        _refuse_unknown(unknown, len(unknown) + len(parsed), folder)
    adapters = sorted({found.adapter for found in parsed.values() if found.part != "base_bias"})
    if len(adapters) > 1:
        raise AdapterUnsupported(
            f"{folder}: the tensors belong to {len(adapters)} adapters, among them {adapters[:3]}; save each one alone"
        )
    return parsed


def _lora_part(pieces: list[str]) -> Key | None:
    # counted from the end, since a module of the base model may bear any name
    for place in range(len(pieces) - 1, max(len(pieces) - 4, -1), -1):
        name, rest = pieces[place], pieces[place + 1 :]
        layer = ".".join(pieces[:place])
        if name in _MATRICES and rest and len(rest) <= 2:
            part: Part | None = _MATRICES[name] if rest[-1] == "weight" else None
            part = "bias" if rest[-1] == "bias" and name == "lora_B" else part
            return Key(layer, part, ".".join(rest[:-1])) if part else None
        if name in _PARAMETERS:
            inner = rest[:-1] if rest[-1:] == ["weight"] else rest
            return Key(layer, _PARAMETERS[name], ".".join(inner)) if len(inner) <= 1 else None
    return None


def _bias(pieces: list[str]) -> Key | None:
    if pieces[-1] != "bias":
        return None
    # a layer that PEFT has wrapped keeps its bias one step down
    wrapped = pieces[-2:-1] == ["base_layer"]
    return Key(".".join(pieces[: -2 if wrapped else -1]), "base_bias")


def _refuse_foreign(key: str, found: Key | None, folder: Path) -> None:
    pieces = key.split(".")
    for piece in pieces:
        if piece in _FOREIGN:
            raise AdapterUnsupported(f"{folder}: tensor {key!r} is {_FOREIGN[piece]}, which has no exact form as factors")
    if found is not None and "base_layer" in found.layer.split("."):
        raise AdapterUnsupported(
            f"{folder}: tensor {key!r} updates a part within a wrapped layer (attention as one module, or a bare "
            "parameter), which has no exact form as factors of a layer"
        )
    if found is None and pieces[-1] == "weight" and pieces[-2:-1] and pieces[-2] in _WHOLE:
        raise AdapterUnsupported(
            f"{folder}: tensor {key!r} is a whole weight of the base model (a head, or a saved embedding), not a low-rank "
            "update, and modules_to_save does not list it; if it was not trained, save the adapter again with "
            "save_embedding_layers=False"
        )


def _refuse_unknown(unknown: list[str], total: int, folder: Path) -> None:
    hint = "; they look like kohya's, not PEFT's" if any(part in unknown[0] for part in _KOHYA) else ""
    raise AdapterCorrupt(
        f"{folder}: {len(unknown)} of {total} tensors are none of PEFT's LoRA: {', '.join(map(repr, unknown[:3]))}{hint}"
    )
