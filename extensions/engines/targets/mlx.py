"""MLX (mlx-lm): `adapters.safetensors` with `lora_a` and `lora_b` of one rank, and a config that names every layer.

mlx-lm (tuner/utils.py and tuner/lora.py of 0.32) takes one rank and one scale for all layers, and adapts the modules whose
paths the config lists, also those of all experts of a layer (LoRASwitchLinear). Its models have the module paths of
transformers only for some architectures.
"""

import json
from pathlib import Path
from typing import Any

from loraweave import AdapterUnsupported
from loraweave.extend.formats import Contents
from loraweave.extend.models import base_config
from loraweave.extensions.engines.export import Target
from loraweave.extensions.engines.targets._writing import (
    place,
    require_known,
    require_plain,
    require_untied,
    stacked,
    tensors_file,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
# the model types of transformers whose modules mlx-lm names as transformers does
SAME_NAMES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
# mlx-lm's name of `mlp.experts` by model type; it names their other modules as transformers does
EXPERTS = {"mixtral": "block_sparse_moe.switch_mlp", "qwen2_moe": "mlp.switch_mlp", "qwen3_moe": "mlp.switch_mlp"}


class Mlx(Target):
    """A folder for `mlx_lm.load(BASE, adapter_path=FOLDER)` and `mlx_lm.generate --adapter-path FOLDER`."""

    one_rank = True

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        require_plain(contents, name, "mlx-lm", kinds=("linear", "embedding", "expert"))
        config = base_config(base)
        if (model_type := getattr(config, "model_type", None)) not in (*SAME_NAMES, *EXPERTS):
            raise AdapterUnsupported(
                f"the base model of adapter {name!r} is of type {model_type!r}, whose modules mlx-lm may name otherwise; "
                f"known are {', '.join((*SAME_NAMES, *EXPERTS))}: merge the adapter into the base with peft and convert "
                "that model"
            )
        require_untied(contents, name, "mlx-lm", config)
        for layer, factors in contents.layers.items():
            if factors.kind == "expert":
                require_known(layer, config, name)

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        config_of_base = base_config(base)
        rank = max(factors.rank for factors in contents.layers.values())
        # a (I, R) and b (R, O), or a (E, R, I) and b (E, O, R)
        pairs = {
            layer: (factors.a_RI.T, factors.b_OR.T) for layer, factors in contents.layers.items() if factors.kind != "expert"
        }
        for path, factors_of_experts in stacked(contents, config_of_base).items():
            pairs[path.replace("mlp.experts", EXPERTS[config_of_base.model_type])] = factors_of_experts
        # mlx-lm multiplies y by `scale`, whatever the rank
        settings = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(pairs)}
        blocks = config_of_base.num_hidden_layers
        config = {"fine_tune_type": "lora", "model": contents.base_model, "num_layers": blocks, "lora_parameters": settings}
        tensors = {
            f"{path}.lora_{side}": part for path, pair in pairs.items() for side, part in zip("ab", pair, strict=True)
        }
        text = json.dumps(config, indent=1, ensure_ascii=False)
        files = {WEIGHTS: tensors_file(tensors), CONFIG: lambda path: path.write_text(text, encoding="utf-8")}
        place(contents, folder, "mlx", files)

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [f"mlx_lm.load(BASE, adapter_path={str(folder)!r}) reads it"]
