"""LoRA files of diffusers, of every age: `unet...to_q.lora_A.weight`, `...lora.down.weight`, `...to_q_lora.down.weight`."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend.formats import parse_json, parse_lora
from loraweave.extend.models import PIPELINE_PARTS
from loraweave.extensions.adapter_types.formats._foreign import require_plain_activation
from loraweave.extensions.adapter_types.formats._lora_file import LoraFile, Parts, rank_of
from loraweave.extensions.adapter_types.formats._placing import WITH_MODEL, BaseNames, Placement

# ComfyUI's prefix for any denoiser, followed by that model's own names
_ANY_MODEL = "diffusion_model."
# the oldest files hold only the pipeline's UNet and do not name it
_BARE_UNET = ("down_blocks.", "up_blocks.", "mid_block.")
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight")
_CONFIG = "lora_adapter_metadata"


class Diffusers(LoraFile):
    """Delta = s up down under the path `component.module`; s is alpha/r if the file has an alpha, else 1.

    An alpha is a tensor beside the factors, or is in the LoRA config that newer versions write into the file's header.
    """

    example = (
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_B.weight",
    )
    files = ("pytorch_lora_weights.safetensors",)
    pickles = ("pytorch_lora_weights.bin",)

    @classmethod
    def knows(cls, names: Collection[str]) -> bool:
        known = (name for name in names if name.startswith((*_BARE_UNET, _ANY_MODEL)) or _component(name))
        return any(cls.split(name) is not None for name in known)

    @classmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        hit = _PROCESSOR.fullmatch(name)
        if hit is not None:
            module = "to_out.0" if hit[2] == "to_out" else hit[2]
            return f"{hit[1]}.{module}", hit[3]
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        return None if suffix is None or name == suffix else (name.removesuffix(suffix), _SUFFIXES[suffix])

    @classmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        known = {} if base is None else base.layers
        for path in (module, module.removeprefix(_ANY_MODEL)):
            if path in known:
                return Placement((path,))
        if module.startswith(_BARE_UNET):
            return Placement((f"unet.{module}",))
        if not _component(module):
            raise AdapterUnsupported(
                f"{where}: {module!r} begins with no part of a pipeline ({', '.join(PIPELINE_PARTS)}), so which model it "
                f"belongs to is not said; give that model: {WITH_MODEL}"
            )
        return Placement((module,))

    @classmethod
    def scales(cls, held: Mapping[str, Parts], metadata: Mapping[str, str], where: str) -> dict[str, float]:
        scales = super().scales(held, metadata, where)
        settings = _settings(metadata, where)
        for component, config in settings.items():
            parsed = parse_lora({"peft_type": "LORA", **config}, Path(where))
            if parsed.use_dora or parsed.lora_bias:
                raise AdapterUnsupported(f"{where}: {component!r} has use_dora or lora_bias, which are not supported")
            require_plain_activation(parsed, f"the layers of {component!r}")
            component_parts = {name: parts for name, parts in held.items() if _component(name) == component}
            below = {name: name.removeprefix(f"{component}.") for name in component_parts}
            ranks = {below[name]: rank_of(parts) or 1 for name, parts in component_parts.items()}
            if any("alpha" in parts for parts in component_parts.values()):
                raise AdapterUnsupported(f"{where}: {component!r} has both a config and tensors of alpha, which may differ")
            for name, expected in parsed.ranks(ranks).items():
                if ranks[name] != expected:
                    raise AdapterUnsupported(
                        f"{where}: {component}.{name} has rank {ranks[name]}, but the config in the header says {expected}, "
                        "so its scale is not known"
                    )
            path_scales = parsed.scales(ranks)
            scales |= {name: path_scales[path] for name, path in below.items()}
        return scales


def _component(name: str) -> str:
    """Return the part of the pipeline, such as "unet", that a module's name begins with, or "" if it has none."""
    first = name.split(".")[0]
    return first if first in PIPELINE_PARTS else ""


def _settings(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """Return {part of the pipeline: its LoRA config} from the metadata in the file's header; {} without."""
    if _CONFIG not in metadata:
        return {}
    try:
        table = parse_json(metadata[_CONFIG].encode())
    except ValueError as error:
        raise AdapterCorrupt(f"{where}: the header's {_CONFIG} is not a valid JSON object: {error}") from error
    settings: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        component = _component(key)
        settings.setdefault(component, {})[key.removeprefix(f"{component}.")] = value
    return settings
