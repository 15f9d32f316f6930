"""kohya's sd-scripts, as ComfyUI and WebUIs read it: `lora_unet_..._to_q.lora_down.weight` with an alpha for each module.

In such a file underscores stand for dots and for themselves. A layer is written only if this package's own reader, which
looks names up in a table, finds the very same layer again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import AdapterUnsupported
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.kohya import Kohya as KohyaFile
from loraweave.hub.targets._target import Target, place, require_plain, stored_factors, tensors_file
from loraweave.hub.targets.diffusers import WEIGHTS, pipeline_path
from loraweave.registry import traits

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# of the text encoder where it is the only one
SINGLE = "lora_te_"


@traits("images")
class Kohya(Target):
    """Read by ComfyUI, by WebUIs and by diffusers' `load_lora_weights`."""

    one_rank = True

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        require_plain(contents, name, "kohya's layout", kinds=("linear", "conv"))
        _modules(contents, name)

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        tensors: dict[str, Tensor] = {}
        for layer, module in _modules(contents, name).items():
            factors = contents.layers[layer]
            tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = stored_factors(factors)
            tensors[f"{module}.alpha"] = torch.tensor(float(factors.rank))
        place(contents, folder, "diffusers", {WEIGHTS: tensors_file(tensors)})

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [f"ComfyUI, WebUIs and pipeline.load_lora_weights({str(folder)!r}) read the file {WEIGHTS}"]


def _modules(contents: Contents, name: str) -> dict[str, str]:
    """The name of each layer in such a file."""
    several = any(layer.startswith("text_encoder_2.") for layer in contents.layers)
    prefixes = PREFIXES if several else {**PREFIXES, "text_encoder": SINGLE}
    return {layer: _module(layer, name, prefixes) for layer in contents.layers}


def _module(layer: str, name: str, prefixes: Mapping[str, str]) -> str:
    path = pipeline_path(layer, name)
    part, _, rest = path.partition(".")
    where = f"layer {layer!r} of adapter {name!r}"
    if part not in prefixes:
        raise AdapterUnsupported(
            f"{where} is of a {part}, for which kohya's layout has no names here: use target='diffusers'"
        )
    module = prefixes[part] + rest.replace(".", "_")
    try:
        found = KohyaFile.place(module, None, where).targets
    except AdapterUnsupported as error:
        raise AdapterUnsupported(
            f"{where} would be {module!r}, which cannot be read back: use target='diffusers'"
        ) from error
    if found != (path,):
        raise AdapterUnsupported(f"{where} would be {module!r}, which is read as {found[0]!r}: use target='diffusers'")
    return module
