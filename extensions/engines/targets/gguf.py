"""llama.cpp: a LoRA as GGUF, named and permuted like llama.cpp's base, and an Ollama Modelfile beside it.

After llama.cpp's conversion of models and adapters (conversion/*.py, convert_lora_to_gguf.py) and its loader
(src/llama-adapter.cpp), as of 2026. The loader multiplies by alpha / rank with the file's one alpha, ignores norms, and has
one matrix for tied embeddings. From 0.34.1 on `ollama create` refuses a Modelfile with ADAPTER (ollama's pull request
14969), so that the Modelfile names the base with the adapter merged into it, which llama.cpp's llama-export-lora writes.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave import AdapterUnsupported, Factors, PackageMissing
from loraweave.extend import traits
from loraweave.extend.formats import Contents
from loraweave.extend.hubs import stated_license
from loraweave.extend.models import base_config, head_size
from loraweave.extensions.engines.export import Target
from loraweave.extensions.engines.targets._writing import (
    matrices,
    place,
    require_known,
    require_plain,
    require_untied,
    stacked,
)

# llama.cpp's architecture of a model type of transformers
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
# models whose rotary embedding rotates neighbours instead of halves, so that rows of q and k have another order
PERMUTED = ("llama", "mistral", "mixtral")
ADAPTER, MODELFILE, MERGED = "adapter.gguf", "Modelfile", "merged.gguf"


@traits("unread")
class Gguf(Target):
    """A folder for `llama-server --lora`, for every other program of llama.cpp, and, once merged, for `ollama create`."""

    one_rank = True
    file = ADAPTER

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise PackageMissing("writing GGUF needs the package gguf: pip install gguf")
        require_plain(contents, name, "llama.cpp", kinds=("linear", "embedding", "expert"))
        config = base_config(base)
        if (model_type := getattr(config, "model_type", None)) not in ARCHITECTURES:
            raise AdapterUnsupported(
                f"the base model of adapter {name!r} is of type {model_type!r}, whose tensors in llama.cpp are not known "
                f"here; known are {', '.join(ARCHITECTURES)}: export target='peft' and use "
                "llama.cpp's convert_lora_to_gguf.py"
            )
        require_untied(contents, name, "llama.cpp", config)
        names = _tensor_names(config)
        for layer, factors in contents.layers.items():
            if factors.kind == "expert":
                for path in matrices(layer.rpartition(".")[0]):
                    _tensor_name(path, names, config, name)
                require_known(layer, config, name)
            else:
                _tensor_name(layer, names, config, name)
                _order(layer, factors, config, name)

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        config = base_config(base)
        names = _tensor_names(config)
        tensors: dict[str, Tensor] = {}
        for path, factors_of_experts in stacked(contents, config).items():
            called = f"{_tensor_name(path, names, config, name).removesuffix('.weight')}.weight"
            tensors[f"{called}.lora_a"], tensors[f"{called}.lora_b"] = factors_of_experts
        for layer, factors in contents.layers.items():
            if factors.kind == "expert":
                continue
            called = _tensor_name(layer, names, config, name)
            # llama.cpp looks up a token's row of lora_a here, and multiplies with lora_a elsewhere
            tensors[f"{called}.lora_a"] = factors.a_RI.T if factors.kind == "embedding" else factors.a_RI
            tensors[f"{called}.lora_b"] = _order(layer, factors, config, name)
        text = f"# {contents.base_model or 'the base model'} as GGUF, with {ADAPTER} merged into it: llama-export-lora\n"
        text += f"FROM ./{MERGED}\n"
        written = _adapter_file(contents, name, ARCHITECTURES[config.model_type], tensors)
        place(contents, folder, "gguf", {ADAPTER: written, MODELFILE: lambda path: path.write_text(text, encoding="utf-8")})

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [
            f"llama-server -m BASE.gguf --lora {folder / ADAPTER} applies it; the base must be the same model as GGUF",
            "beside other adapters start it with --cache-ram 0: its cache of prompts does not know which adapter read them "
            "(llama.cpp's issue 26207)",
            "for Ollama, which from 0.34.1 on takes no ADAPTER, merge it into the base: llama-export-lora -m BASE.gguf "
            f"--lora {folder / ADAPTER} -o {folder / MERGED}; then: ollama create NAME -f {folder / MODELFILE}",
        ]


def _tensor_names(config: Any) -> Any:
    """Return gguf's table of names for all layers of this base, which takes a tenth of a second to make."""
    import gguf

    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[ARCHITECTURES[config.model_type]], config.num_hidden_layers)


def _tensor_name(layer: str, names: Any, config: Any, name: str) -> str:
    tensor_name: str | None = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
    if tensor_name is None:
        raise AdapterUnsupported(
            f"layer {layer!r} of adapter {name!r} is not a tensor of llama.cpp's {ARCHITECTURES[config.model_type]}: was "
            "the adapter made for another base model?"
        )
    return tensor_name


def _order(layer: str, factors: Factors, config: Any, name: str) -> Tensor:
    """Return b with its rows in llama.cpp's order: within each head, the two halves of q's and k's rows are interleaved."""
    last = layer.rpartition(".")[2]
    if config.model_type not in PERMUTED or last not in ("q_proj", "k_proj"):
        return factors.b_OR
    heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
    rows = factors.b_OR.shape[0]
    size = head_size(config)
    if size is None or rows != heads * size:
        raise AdapterUnsupported(
            f"layer {layer!r} of adapter {name!r} has {rows} outputs, but the base model has {heads} heads of {size}: was "
            "the adapter made for another base model?"
        )
    return interleaved(factors.b_OR, size)


def interleaved(b_OR: Tensor, size: int) -> Tensor:
    """Return b with the halves of each head of `size` rows interleaved, so that rotary pairs are adjacent."""
    return b_OR.reshape(-1, 2, size // 2, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)


def _adapter_file(contents: Contents, name: str, arch: str, tensors: dict[str, Tensor]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # so that alpha / rank is 1: the scale is in b
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(max(factors.rank for factors in contents.layers.values())))
        writer.add_name(name or "adapter")
        if license := stated_license(contents.card.get("license")):
            writer.add_license(license)
        if contents.base_model:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, contents.base_model)
        for called, tensor in tensors.items():
            writer.add_tensor(called, tensor.detach().cpu().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write
