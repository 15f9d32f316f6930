"""LoRA files of Sam_LoRA for Segment Anything: `w_a_000` and `w_b_000`, two such pairs for each block."""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extensions.adapter_types.formats._lora_file import LoraFile
from loraweave.extensions.adapter_types.formats._placing import WITH_MODEL, BaseNames, Placement

_NAME = re.compile(r"w_([ab])_(\d{3,4})")
# the layers of segment_anything, and of transformers' SamModel
_QKV = re.compile(r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.attn\.qkv")


class Sam(LoraFile):
    """Delta of a block's fused projection = [B_q A_q; 0; B_v A_v], unscaled (https://github.com/JamesQFreeman/Sam_LoRA).

    Pair 2n is the queries of block n, 2n + 1 its values. The file names no layer, so that the model is needed, with as many
    blocks as the file.
    """

    example = ("w_a_000", "w_b_000")

    @classmethod
    def knows(cls, names: Collection[str]) -> bool:
        return any(_NAME.fullmatch(name) for name in names)

    @classmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        hit = _NAME.fullmatch(name)
        return None if hit is None else (str(int(hit[2])), "down" if hit[1] == "a" else "up")

    @classmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        block, blocks = module.split(" of ")
        if base is None:
            raise AdapterUnsupported(
                f"{where}: the tensors w_a_000 and so on name no layer; give the Segment Anything model that they are for: "
                f"{WITH_MODEL}"
            )
        paths = {int(hit[1]): path for path in base.layers if (hit := _QKV.fullmatch(path))}
        if len(paths) != int(blocks):
            raise AdapterUnsupported(
                f"{where}: the file has the queries and values of {blocks} blocks, and the model has {len(paths)} blocks "
                "with a fused projection attn.qkv, so that which are meant is not known"
            )
        return Placement((paths[int(block)],))

    @classmethod
    def _held(cls, folder: Path, name: str) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
        pairs, dtypes = super()._held(folder, name)
        where, blocks = str(folder / name), len(pairs) // 2
        joined = {}
        for block in range(blocks):
            both = [pairs.get(str(2 * block + part), {}) for part in range(2)]
            shapes = [[tuple(pair[part].shape) for part in ("down", "up") if part in pair] for pair in both]
            if len(pairs) % 2 or [len(pair_shapes) for pair_shapes in shapes] != [2, 2] or shapes[0] != shapes[1]:
                raise AdapterCorrupt(
                    f"{where}: {len(pairs)} pairs of w_a and w_b, of which block {block} has the shapes {shapes}; a block "
                    "has one pair for its queries and one of the same shapes for its values"
                )
            (a_q, b_q), (a_v, b_v) = ((pair["down"], pair["up"]) for pair in both)
            joined[f"{block} of {blocks}"] = {"down": torch.cat([a_q, a_v]), "up": _stacked(b_q, b_v, where)}
        if not joined:
            raise AdapterCorrupt(f"{where}: one pair of w_a and w_b, where a block has two")
        return joined, dtypes


def _stacked(b_q: Tensor, b_v: Tensor, where: str) -> Tensor:
    if b_q.dim() != 2:
        raise AdapterCorrupt(f"{where}: a w_b of shape {tuple(b_q.shape)} is not a matrix")
    num_outputs, rank = b_q.shape
    up = b_q.new_zeros(3 * num_outputs, 2 * rank)
    up[:num_outputs, :rank], up[-num_outputs:, rank:] = b_q, b_v
    return up
