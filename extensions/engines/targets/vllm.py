"""vLLM: a PEFT folder that obeys the rules of its loader, of one rank, and the flags of the server.

vLLM (its PEFTHelper, LoRAConfig and LoRAModel, as of 2025 and 2026) takes one `r` and one `lora_alpha` for all layers, since
most releases silently ignore rank_pattern and alpha_pattern; an `r` up to `--max-lora-rank`, which must be one of a few
sizes; no DoRA, no bias, no whole modules; and tensors called lora_A and lora_B of layers that it has under that name.
"""

import json
from pathlib import Path
from typing import Any

from loraweave import AdapterUnsupported
from loraweave.extend.formats import Contents, module_names
from loraweave.extensions.engines.export import TIED_MODULES, Target
from loraweave.extensions.engines.targets._writing import require_plain

# the values that every release of vLLM takes for --max-lora-rank; recent ones also take 1
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# layers that vLLM computes as one; its loader packs the factors of the parts itself
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Vllm(Target):
    """A folder for `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`, and for vLLM's dynamic loading."""

    limit = RANKS[-1]
    one_rank = True

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        if any(factors.kind == "expert" for factors in contents.layers.values()):
            raise AdapterUnsupported(
                f"adapter {name!r} updates fused experts, whose factors vLLM 0.32 divides as PEFT does only for models with "
                "is_3d_moe_weight, or under --enable-mixed-moe-lora-format where the request has is_3d_lora_weight: write "
                "it with target='peft', and see to that in vLLM, or use `loraweave serve`"
            )
        require_plain(contents, name, "vLLM", kinds=("linear", "embedding"))
        if not contents.base_model:
            raise AdapterUnsupported(
                f"adapter {name!r} names no base model, by which vLLM's resolvers find it: "
                "give it one with dataclasses.replace(adapter, base_model=...)"
            )

    @classmethod
    def program(cls, contents: Contents) -> tuple[str, ...]:
        return ("vllm", "serve", contents.base_model)

    @classmethod
    def flags(cls, contents: Contents, name: str, folder: Path, rank: int) -> tuple[str, ...]:
        path = str(folder.absolute())
        called = name or folder.absolute().name
        module = f"{called}={path}"
        # vLLM reads name=path only where neither has one of these
        if any(mark in called + path for mark in "=,{"):
            module = json.dumps({"name": called, "path": path, "base_model_name": contents.base_model})
        # one adapter and a free slot
        return ("--enable-lora", "--max-lora-rank", str(_reserved(rank)), "--max-loras", "2", "--lora-modules", module)

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        notes = ["vLLM does not load value_head.safetensors"] if "value_head.safetensors" in contents.files else []
        modules = set(module_names(contents.layers))
        only = (
            "vLLM loads it only for architectures that list it among their embedding_modules, and refuses the adapter for "
            "others"
        )
        notes += [f"{module!r} has an update: {only}" for module in sorted(modules & TIED_MODULES)]
        for packed, parts in PACKED.items():
            if used := sorted(modules & set(parts)):
                notes.append(
                    f"vLLM computes {', '.join(parts)} as one {packed}; it packs the factors of {', '.join(used)} by itself"
                )
        notes.append(
            "--max-loras is the number of adapters and one more: with every slot taken, vLLM 0.32 on CPU answers requests "
            "for the base with an adapter when both share a batch (its pull requests 48421 and 49656); each adapter added "
            "takes one slot more"
        )
        if rank != _reserved(rank):
            notes.append(
                f"vLLM reserves rank {_reserved(rank)} for this rank {rank}, since --max-lora-rank has only certain sizes"
            )
        return notes


def _reserved(rank: int) -> int:
    return next(size for size in RANKS if size >= rank)
