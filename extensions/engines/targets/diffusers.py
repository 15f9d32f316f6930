"""diffusers: `pytorch_lora_weights.safetensors` with `unet...lora_A.weight`, of one rank; ComfyUI reads it too.

diffusers (loaders/lora_pipeline.py, utils/peft_utils.py of 0.42) divides by the ranks of the tensors; earlier versions took
one of them for all layers, so every layer has the same. A name that begins with no part of the pipeline is ignored without
an error, `base_model.model.unet...` among them.
"""

from pathlib import Path
from typing import Any

from loraweave import AdapterUnsupported
from loraweave.extend import traits
from loraweave.extend.formats import Contents
from loraweave.extend.models import PIPELINE_PARTS
from loraweave.extensions.engines.export import Target
from loraweave.extensions.engines.targets._writing import place, require_plain, stored_factors, tensors_file

WEIGHTS = "pytorch_lora_weights.safetensors"
# before it, transformers 5 removed the step `text_model` from the paths; files and programs still have it
CLIP = "encoder.layers."
# the modules of a UNet, which tell an adapter made for the UNet alone
UNET = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")


@traits("images")
class Diffusers(Target):
    """A folder for `pipeline.load_lora_weights(FOLDER)`."""

    one_rank = True
    file = WEIGHTS

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        require_plain(contents, name, "diffusers", kinds=("linear", "conv"))
        for layer in contents.layers:
            pipeline_path(layer, name)

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        tensors = {}
        for layer, factors in contents.layers.items():
            path = pipeline_path(layer, name)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = stored_factors(factors)
        place(contents, folder, "diffusers", {WEIGHTS: tensors_file(tensors)})

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [f"pipeline.load_lora_weights({str(folder)!r}) reads it, and ComfyUI the file {WEIGHTS}"]


def pipeline_path(layer: str, name: str) -> str:
    """Return the layer's path in a pipeline, which begins with a part such as `unet`; for CLIP as before transformers 5."""
    part, _, rest = layer.partition(".")
    if part in PIPELINE_PARTS:
        return f"{part}.text_model.{rest}" if rest.startswith(CLIP) else layer
    if layer.startswith(UNET):
        return f"unet.{layer}"
    raise AdapterUnsupported(
        f"layer {layer!r} of adapter {name!r} begins with no part of a pipeline ({', '.join(PIPELINE_PARTS)}), so which "
        "model it belongs to is not said: put that before the names of its layers with dataclasses.replace(adapter, "
        "layers={'transformer.' + layer: ...})"
    )
