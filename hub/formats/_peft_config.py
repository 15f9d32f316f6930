"""adapter_config.json: which fields change the meaning of the tensors, which do not, and which cannot be represented.

Every field of PEFT's LoraConfig is in exactly one of the tables below; a field in none of them is refused unless it is null,
false or empty, since a newer PEFT may have given it a meaning.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterSuspicious, AdapterUnsupported
from loraweave.hub.formats._config import (
    AdapterConfig,
    extension_module,
    missing_extension,
    resolve_patterns,
    shorten,
    words,
)
from loraweave.hub.formats._files import listing, open_file, present
from loraweave.hub.formats._safetensors import read_tensors, shards, tensor_names
from loraweave.lowrank.algebra import MAX_FP32
from loraweave.types import Factors

MAX_RANK = 65_536
# the number of tokens that activate an aLoRA
MAX_INVOCATION = 1_000

# read by `PeftConfig` and by the reader of the tensors
HANDLED = words(
    "peft_type base_model_name_or_path revision task_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora "
    "lora_bias bias fan_in_fan_out target_modules target_parameters init_lora_weights modules_to_save "
    "alora_invocation_tokens"
)

# fields about the training and the machine, and settings of other fields, which are judged themselves: the tensors in the
# file say which layers exist and what they hold
BENIGN = words(
    "auto_mapping peft_version inference_mode lora_dropout exclude_modules layers_to_transform layers_pattern megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config merge_weights mora_type"
)

# fields without an exact form as factors, unless they are null, false or empty
REFUSED = {
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "a base model with repeated layers",
    "megatron_config": "layers of Megatron",
    "use_qalora": "pooled inputs",
    "arrow_config": "a router over several adapters",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "a truncated base weight",
    "monteclora_config": "sampled factors",
    "velora_config": "compressed activations with their own buffers",
    "ensure_weight_tying": "factors shared by tied layers",
    "enable_lora": "factors for parts of a fused projection",
    "use_mora": "one square matrix between inputs and outputs",
}

# for these tasks PEFT trains a head, whether modules_to_save lists it or not
HEAD_TASKS = words("SEQ_CLS TOKEN_CLS QUESTION_ANS")

# initialisations that only choose where training starts, and leave the base model's weights as they are
HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an adapter_config.json that give the tensors their meaning, and `recorded`, to be written back."""

    folder: Path
    base_model: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    task_type: str = ""
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def ranks(self, layers: Iterable[str]) -> dict[str, int]:
        """Map each layer to the rank that PEFT would give it."""
        return resolve_patterns(self.folder, "rank_pattern", self.rank_pattern, layers, self.rank)[0]

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Map each layer to its scale: alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023).

        Warns if several alpha patterns of different value match a layer; the first in the file decides, as in PEFT.
        """
        alphas, disputed = resolve_patterns(self.folder, "alpha_pattern", self.alpha_pattern, ranks, self.alpha)
        if disputed:
            layer, values = next(iter(disputed.items()))
            warnings.warn(
                f"{self.folder}: {len(disputed)} layers match alpha_pattern entries with different values, for one "
                f"{layer!r} with {values}; the first in the file is taken, as PEFT does, but PEFT sorts the entries when it "
                "saves, so training may have used another one",
                UserWarning,
                stacklevel=2,
            )
        return {layer: alphas[layer] / (math.sqrt(rank) if self.use_rslora else rank) for layer, rank in ranks.items()}


def parse_lora(config: Mapping[str, Any], folder: Path) -> PeftConfig:
    """Return the parsed config.

    Raises AdapterUnsupported for fields without an exact form, AdapterCorrupt for a wrong type, AdapterSuspicious for an
    alpha beyond fp32, in which PEFT multiplies by it.
    """
    if "peft_type" not in config:
        raise AdapterUnsupported(f"{folder}: adapter_config.json has no peft_type, so it is not the config of a LoRA")
    if config["peft_type"] != "LORA":
        raise AdapterUnsupported(f"{folder}: peft_type is {shorten(config['peft_type'])}; only 'LORA' can be read")
    reader = AdapterConfig(folder, config)
    why = f"cannot be represented exactly as low-rank factors{missing_extension()}"
    reader.check_fields(HANDLED | BENIGN, {name: f"{what} {why}" for name, what in REFUSED.items()})
    _check_init(config.get("init_lora_weights", True), folder)
    switches = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
    flags = {name: config.get(name) is not None and reader.flag(name) for name in switches}
    transposed = flags.pop("fan_in_fan_out")
    if flags["use_dora"] and flags["lora_bias"]:
        raise AdapterUnsupported(f"{folder}: use_dora and lora_bias are both true, which PEFT does not define")
    if flags["use_dora"] and config.get("init_lora_weights") == "mica":
        raise AdapterUnsupported(f"{folder}: use_dora with init_lora_weights='mica': PEFT applies only one of them")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterCorrupt(f"{folder}: bias is {shorten(config['bias'])}, none of 'none', 'all', 'lora_only'")
    invocation = reader.whole_numbers("alora_invocation_tokens", most=MAX_INVOCATION)
    if invocation and reader.text("task_type") not in ("", "CAUSAL_LM"):
        raise AdapterUnsupported(
            f"{folder}: alora_invocation_tokens with task_type {config['task_type']!r}: PEFT looks for them in the prompts "
            "of a CAUSAL_LM alone, and never applies the adapter of another task"
        )
    recorded = {name: config[name] for name in ("target_modules", "task_type", "r", "lora_alpha") if name in config}
    recorded["fan_in_fan_out"] = transposed
    if revision := reader.text("revision"):
        recorded["revision"] = revision
    alpha, alphas = reader.number("lora_alpha"), reader.numbers("alpha_pattern")
    for name, value in {"lora_alpha": alpha, **{f"alpha_pattern[{key!r}]": value for key, value in alphas.items()}}.items():
        if abs(value) > MAX_FP32:
            raise AdapterSuspicious(f"{folder}: {name} is {value:g}, beyond what fp32 holds ({MAX_FP32:.3g})")
    return PeftConfig(
        folder=folder,
        base_model=reader.text("base_model_name_or_path"),
        rank=reader.count("r", most=MAX_RANK),
        alpha=alpha,
        rank_pattern=reader.counts("rank_pattern", most=MAX_RANK),
        alpha_pattern=alphas,
        **flags,
        bias=config.get("bias", "none"),
        task_type=reader.text("task_type"),
        modules_to_save=reader.names("modules_to_save"),
        target_parameters=reader.names("target_parameters"),
        invocation=invocation,
        recorded=recorded,
    )


def _check_init(init: Any, folder: Path) -> None:
    if init is None or type(init) is bool or str(init).lower() in HARMLESS_INITS:
        return
    raise AdapterUnsupported(
        f"{folder}: init_lora_weights={shorten(init)} changed the base model's weights in training, so the factors are no "
        "update of the original ones; convert the adapter with PEFT's save_pretrained(..., "
        f"path_initial_model_for_weight_conversion=...), which writes an ordinary LoRA{missing_extension()}"
    )


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
_WHOLE = words("base_layer embed_tokens lm_head wte shared word_embeddings embed_in embed_out classifier score")


class Key(NamedTuple):
    """A parsed tensor name; `adapter` is the adapter's name inside the key, empty if there is none."""

    layer: str
    part: Part
    adapter: str = ""


def parse_key(key: str) -> Key | None:
    """Return the layer and part that a tensor name means, or None for a name that PEFT's LoRA does not use.

    The prefix `base_model.model.` may be missing, there once, or doubled (a PeftModel wrapped twice).
    """
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    pieces = key.split(".")
    parsed_key = _lora_part(pieces)
    if parsed_key is None and pieces[-1] == "bias":
        # a layer that PEFT has wrapped keeps its bias one step down
        parsed_key = Key(".".join(pieces[: -2 if pieces[-2:-1] == ["base_layer"] else -1]), "base_bias")
    return None if parsed_key is None or not parsed_key.layer or "" in pieces else parsed_key


def check_all_known(keys: Iterable[str], folder: Path, *, nested: bool = False) -> dict[str, Key]:
    """Map each tensor name to its `Key`. Raises AdapterUnsupported for unsupported features, AdapterCorrupt for others.

    `nested` permits wrappers within wrappers, as PEFT makes for several target_parameters of one module.
    """
    parsed: dict[str, Key] = {}
    unknown: list[str] = []
    for key in keys:
        parsed_key = parse_key(key)
        _refuse_foreign(key, parsed_key, folder, nested)
        if parsed_key is None:
            unknown.append(key)
        else:
            parsed[key] = parsed_key
    if unknown:
        hint = "; they look like kohya's, not PEFT's" if any(part in unknown[0] for part in ("lora_down", "lora_up")) else ""
        raise AdapterCorrupt(
            f"{folder}: {len(unknown)} of {len(unknown) + len(parsed)} tensors are not PEFT's LoRA: "
            f"{', '.join(map(repr, unknown[:3]))}{hint}{missing_extension()}"
        )
    adapters = sorted({parsed_key.adapter for parsed_key in parsed.values() if parsed_key.part != "base_bias"})
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


def _refuse_foreign(key: str, found: Key | None, folder: Path, nested: bool) -> None:
    pieces = key.split(".")
    for piece in pieces:
        if piece in _FOREIGN:
            raise AdapterUnsupported(f"{folder}: tensor {key!r} is {_FOREIGN[piece]}, which has no exact form as factors")
    if found is not None and not nested and "base_layer" in found.layer.split("."):
        raise AdapterUnsupported(
            f"{folder}: tensor {key!r} updates a part within a wrapped layer (attention as one module, or a parameter that "
            "the config's target_parameters do not name), which has no exact form as factors of a layer"
        )
    if found is None and pieces[-1] == "weight" and pieces[-2:-1] and pieces[-2] in _WHOLE:
        raise AdapterUnsupported(
            f"{folder}: tensor {key!r} is a whole weight of the base model (a head, or a saved embedding), not a low-rank "
            "update, and modules_to_save does not list it; if it was not trained, save the adapter again with "
            "save_embedding_layers=False"
        )


WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "adapter_model.bin"


def stored_tensors(folder: Path, *, allow_pickle: bool = False, integers: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Return an iterator of (key, dtype in the file, tensor in fp32) of every tensor of an adapter folder.

    A pickle is read only with `allow_pickle`, only if there are no safetensors, and by the safe loader.
    """
    if allow_pickle and present(folder, PICKLE) and not present(folder, WEIGHTS) and not present(folder, INDEX):
        reader = extension_module("pickles", f"{folder}: {PICKLE}")
        pickled: Iterator[tuple[str, str, Tensor]] = reader.read_pickle(folder, PICKLE, integers=integers)
        return pickled
    return read_tensors(folder, weight_files(folder), integers=integers)


def path_of(layer: str, factors: Factors) -> str:
    """Return the path that PEFT's patterns and targets name: the layer's, or for an expert that of its fused parameter."""
    return layer.rpartition(".")[0] if factors.kind == "expert" else layer


def module_names(layers: Mapping[str, Factors]) -> tuple[str, ...]:
    """Return the last names of the layers' paths, such as q_proj, sorted; for an expert, that of its parameter."""
    return tuple(sorted({path_of(layer, factors).rpartition(".")[2] for layer, factors in layers.items()}))


def stored_names(folder: Path) -> list[str]:
    """Return the names of the tensors in a PEFT folder's safetensors files; only headers are read."""
    return [name for file in weight_files(folder) for name in tensor_names(folder, file)]


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files. Raises AdapterUnsupported for a pickle, AdapterCorrupt for none."""
    if present(folder, WEIGHTS):
        return [WEIGHTS]
    if present(folder, INDEX):
        return shards(folder, INDEX)
    if present(folder, PICKLE):
        # opened only for its checks: a git-LFS pointer of that name needs another way out
        with open_file(folder, PICKLE):
            pass
        raise AdapterUnsupported(
            f"{folder}: the weights are only in {PICKLE}, a pickle, which can run code when it is read; have it read by the "
            "safe loader: allow_pickle=True (--allow-pickle in the shell), or convert it: "
            f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS}')"
        )
    raise AdapterCorrupt(f"{folder}: no {WEIGHTS}; the folder holds {listing(folder)}")
