"""OpenVINO GenAI: a PEFT folder whose file has all scales in its factors, since `openvino_genai.Adapter` reads no config.

OpenVINO GenAI (src/cpp/src/lora/adapter.cpp, as of 2026) patches matrix products and convolutions of width 1, which it finds
by searching for the name of a layer inside the name of a node. It ignores the file's alpha and adapter_config.json: the
strength is the one given to `AdapterConfig`, 1 by default.
"""

from itertools import permutations
from pathlib import Path
from typing import Any

from loraweave import AdapterUnsupported
from loraweave.extend.formats import Contents
from loraweave.extensions.engines.export import Target
from loraweave.extensions.engines.targets._writing import require_plain


class Openvino(Target):
    """A folder for `openvino_genai.Adapter(FOLDER/adapter_model.safetensors)`."""

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        require_plain(contents, name, "OpenVINO GenAI")
        for layer, longer in permutations(contents.layers, 2):
            if layer in longer:
                raise AdapterUnsupported(
                    f"layer {layer!r} of adapter {name!r} has a name that is part of {longer!r}, and OpenVINO GenAI, which "
                    "looks for names inside names, may apply its update to both: export without one of them, or merge the "
                    "adapter into the base with peft and serve that model"
                )

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [
            f"openvino_genai.Adapter({str(folder / 'adapter_model.safetensors')!r}) reads it, for a base that optimum-cli "
            "exported; leave alpha at 1, the scale is in the factors",
            "OpenVINO's reader of GGUF models drops adapters with a line in its log: load the base in OpenVINO's own format",
            "on processors with bf16 OpenVINO computes in it unless INFERENCE_PRECISION_HINT is f32",
        ]
