"""LoRA of Megatron (NeMo, Megatron-Bridge): `linear_qkv.adapter.linear_in`, query, key and value in one projection."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend import is_number
from loraweave.extend.formats import entry, present, read_bytes
from loraweave.extensions.adapter_types.formats._lora_file import LoraFile, Parts, rank_of
from loraweave.extensions.adapter_types.formats._placing import WITH_MODEL, BaseNames, Placement

# a module below its layer, as each generation of the software names it: the base's modules that it updates, in B's order
_ATTENTION, _MLP = "self_attn", "mlp"
_FUSED_QKV = tuple(f"{_ATTENTION}.{part}_proj" for part in "qkv")
MODULES = {
    "self_attention.linear_qkv.adapter": _FUSED_QKV,
    "self_attention.adapter_layer.lora_kqv_adapter": _FUSED_QKV,
    "self_attention.linear_proj.adapter": (f"{_ATTENTION}.o_proj",),
    "self_attention.adapter_layer.lora_dense_attention_adapter": (f"{_ATTENTION}.o_proj",),
    "mlp.linear_fc1.adapter": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
    "mlp.adapter_layer.lora_hto4h_adapter": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
    "mlp.linear_fc2.adapter": (f"{_MLP}.down_proj",),
    "mlp.adapter_layer.lora_4htoh_adapter": (f"{_MLP}.down_proj",),
    **{f"self_attention.linear_qkv.adapter.adapter_{part}": (f"{_ATTENTION}.{part}_proj",) for part in "qkv"},
    **{
        f"self_attention.adapter_layer.lora_unfused_kqv_adapter.{part}_adapter": (f"{_ATTENTION}.{part}_proj",)
        for part in "qkv"
    },
    **{f"mlp.linear_fc1.adapter.adapter_{part}": (f"{_MLP}.{part}_proj",) for part in ("gate", "up")},
    **{f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{part}_adapter": (f"{_MLP}.{part}_proj",) for part in ("gate", "up")},
}
_NAME = re.compile(r"(.*\blayers\.\d+\..+)\.linear_(in|out)\.weight")
_LAYER = re.compile(r".*?\blayers\.(\d+)\.(.+)")
# the settings of the two generations: the file, the keys that lead to them, and the name of the rank
CONFIGS = (
    ("run_config.yaml", ("peft",), "dim"),
    ("model_config.yaml", ("peft", "lora_tuning"), "adapter_dim"),
)
MAX_CONFIG_BYTES = 2**20


class Megatron(LoraFile):
    """Delta = alpha/r out in, for the layers of the given base, whose sizes decide how fused projections divide.

    Rows of `linear_qkv` are in groups: the queries of a group, its key, its value. `linear_fc1` is gate above up. The alpha
    is in `run_config.yaml` or `model_config.yaml` beside the file. One file must have all of every tensor: parts of
    tensor-parallel ranks are refused by their sizes.
    """

    example = (
        "decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight",
        "decoder.layers.0.mlp.linear_fc2.adapter.linear_out.weight",
    )
    pickles = ("model_weights.ckpt",)

    @classmethod
    def knows(cls, names: Collection[str]) -> bool:
        return any(_NAME.fullmatch(name) and "adapter" in name for name in names)

    @classmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        hit = _NAME.fullmatch(name)
        return None if hit is None else (hit[1], {"in": "down", "out": "up"}[hit[2]])

    @classmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        hit = _LAYER.fullmatch(module)
        targets = MODULES.get(hit[2]) if hit is not None else None
        if hit is None or targets is None:
            raise AdapterUnsupported(
                f"{where}: {module!r} is not one of the modules known here: {', '.join(MODULES)} below layers.#"
            )
        if base is None:
            raise AdapterUnsupported(
                f"{where}: Megatron's names and fused projections are not those of the base, whose modules and sizes "
                f"decide; give the base model as transformers has it: {WITH_MODEL}"
            )
        paths = tuple(_path(f"layers.{hit[1]}.{target}", base, where) for target in targets)
        return _place_groups(paths, base, where) if targets == _FUSED_QKV else Placement(paths, (1,) * len(paths))

    @classmethod
    def scales(cls, held: Mapping[str, Parts], metadata: Mapping[str, str], where: str) -> dict[str, float]:
        folder = Path(where).parent
        rank, alpha = _settings(folder)
        for module, parts in held.items():
            if (stored_rank := rank_of(parts)) is not None and stored_rank != rank:
                raise AdapterCorrupt(
                    f"{where}: {module!r} has rank {stored_rank}, but the config says {rank:g}; a part of a tensor-parallel "
                    "rank? Gather the parts first"
                )
        return dict.fromkeys(held, alpha / rank)


def _path(end: str, base: BaseNames, where: str) -> str:
    names = [name for name in base.layers if name == end or name.endswith(f".{end}")]
    if len(names) != 1:
        held = f"{len(names)} modules of that name: {', '.join(names[:3])}" if names else "no module of that name"
        raise AdapterUnsupported(f"{where}: an update of {end!r}, but the model given has {held}")
    return names[0]


def _place_groups(paths: tuple[str, ...], base: BaseNames, where: str) -> Placement:
    """Return the placement of a fused projection at the `paths` of query, key and value, in groups of one key head each."""
    queries, keys, values = (base.layers[path].num_outputs for path in paths)
    size = base.head_size
    if size is None or keys != values or keys % size or queries % keys:
        raise AdapterUnsupported(
            f"{where}: the fused projection of {', '.join(paths)} with {queries}, {keys} and {values} outputs cannot be "
            f"divided by a head size of {size}, which the model's config gives"
        )
    return Placement(paths, (queries // keys, 1, 1), groups=keys // size)


def _settings(folder: Path) -> tuple[float, float]:
    """Return (rank, alpha) from the config in the folder. Raises AdapterUnsupported if it has none."""
    for name, steps, rank_name in CONFIGS:
        if not present(folder, name):
            continue
        try:
            fields: Any = yaml.safe_load(read_bytes(folder, name, MAX_CONFIG_BYTES))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise AdapterCorrupt(f"{folder}: {name} is not plain YAML: {str(error).splitlines()[0]}") from error
        for step in steps:
            fields = entry(fields, step, dict)
        values = fields or {}
        rank: Any = values.get(rank_name)
        # NeMo omits an alpha that equals the rank
        alpha: Any = values.get("alpha", rank if name == "model_config.yaml" else None)
        if not is_number(rank, 1) or not is_number(alpha):
            raise AdapterCorrupt(f"{folder}: {name} has no numbers {rank_name} and alpha under {'.'.join(steps)}")
        return float(rank), float(alpha)
    names = " nor ".join(name for name, *_ in CONFIGS)
    raise AdapterUnsupported(
        f"{folder}: neither {names} is beside the file, so alpha, and with it the scale, is not known; copy it from the "
        "training run"
    )
