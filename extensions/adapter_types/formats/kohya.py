"""LoRA files of kohya's sd-scripts and LyCORIS: `lora_unet_..._to_q.lora_down.weight`, paths with underscores for dots."""

import re
from collections.abc import Collection
from functools import cache
from typing import ClassVar

import loraweave.extensions.adapter_types.formats._known_modules as modules
from loraweave import AdapterUnsupported
from loraweave.extensions.adapter_types.formats._lora_file import MATRICES, LoraFile
from loraweave.extensions.adapter_types.formats._placing import BaseNames, Placement, Rules, only, turned

# the prefix of a module: (the part of the pipeline that it belongs to, the rules of the architectures it may be of)
PREFIXES = {
    "lora_unet_": ("unet", (modules.UNET, modules.ORIGINAL_UNET, modules.ORIGINAL_FLUX, modules.ORIGINAL_SD3, modules.FLUX)),
    "lora_transformer_": ("transformer", (modules.FLUX,)),
    "lora_te_": ("text_encoder", (modules.text_encoder("text_encoder"),)),
    "lora_te1_": ("text_encoder", (modules.text_encoder("text_encoder"),)),
    "lora_te2_": ("text_encoder_2", (modules.text_encoder("text_encoder_2"),)),
    "lora_te3_": ("text_encoder_3", ()),
    "lycoris_": ("", ()),
}
_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha"}
_NAME = re.compile(r"(?:lora|lycoris)_\w+\.(?:lora_(?:down|up)\.weight|hada_w\w+|lokr_w\w+)")
_OTHERS = {
    "dora_scale": "a magnitude of weight decomposition, whose axis the file does not say",
    "diff": "a whole change of a weight",
    "diff_b": "a whole change of a bias",
    "oft_blocks": "a rotation of the weight",
    "oft_diag": "a rotation of the weight",
    "b1.weight": "a generalised LoRA",
}


class Kohya(LoraFile):
    """Delta = alpha/r up down, as LoRA, LoCon (convolutions), LoHa or LoKr. A name is looked up, never split at underscores.

    Underscores stand for dots and for themselves. The base model, if given, decides what a name means, else a table of the
    modules of Stable Diffusion 1, 2, 3 and XL and FLUX.1 with their CLIP text encoders; the paths then begin with the part
    of diffusers' pipeline, as in `unet.mid_block.attentions.0.proj_in`.
    """

    # the rules of transformers whose modules join several layers, by the first letters of diffusers' classes
    family_rules: ClassVar[dict[str, list[modules.Rule]]] = {"Flux": modules.ORIGINAL_FLUX, "SD3": modules.ORIGINAL_SD3}
    turned = staticmethod(turned)
    example = (
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    )

    @classmethod
    def knows(cls, names: Collection[str]) -> bool:
        return any(_NAME.fullmatch(name) for name in names)

    @classmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        module, _, part = name.partition(".")
        if part in _OTHERS:
            raise AdapterUnsupported(
                f"tensor {name!r} is {_OTHERS[part]}, which is not supported; train or export a plain LoRA"
            )
        known = _PARTS.get(part, part if part in MATRICES else None)
        return None if known is None or (known in ("down", "up", "mid") and part not in _PARTS) else (module, known)

    @classmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), None)
        if prefix is None:
            raise AdapterUnsupported(f"{where}: {module!r} begins with none of the known prefixes {', '.join(PREFIXES)}")
        component, _ = PREFIXES[prefix]
        flat = module.removeprefix(prefix)
        placements = [] if base is None else [Placement((path,)) for path in base.by_flat(flat, component)]
        return only(placements or _rules(prefix).find(flat), module, where, model_given=base is not None)


@cache
def _rules(prefix: str) -> Rules:
    return Rules(rule for table in PREFIXES[prefix][1] for rule in table)
