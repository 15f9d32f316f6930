"""LoRA of PEFT before 0.3 on a fused projection: factors for some of its equal parts (`enable_lora`), as loralib has it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._conversion import plain
from loraweave.hub.formats._files import present, read_json
from loraweave.hub.formats._foreign import Config, ForeignFormat, Layer
from loraweave.hub.formats._peft_config import parse
from loraweave.hub.formats._peft_files import CONFIG
from loraweave.types import Factors


class MergedLinear(ForeignFormat):
    """Delta = alpha/r times B A in each part that `enable_lora` names, zero in the others: exactly of the rows of A.

    The outputs are cut into as many equal runs as the list has entries, whatever the base keeps there. A has r rows for
    every part in use, and B is a convolution of width 1 in groups, each over its own rows of A.
    """

    peft_type = "LORA"
    parts = frozenset({"lora_A.weight", "lora_B.weight"})

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the folder's config is a LoRA with `enable_lora`."""
        try:
            fields = read_json(folder, CONFIG) if present(folder, CONFIG) else {}
        except AdapterCorrupt:
            return False
        return fields.get("peft_type") == "LORA" and bool(fields.get("enable_lora"))

    @classmethod
    def update(cls, layer: Layer) -> Factors:
        used = _used(layer.config)
        a_RI, b_ORk = layer.part("lora_A.weight", None, None), layer.part("lora_B.weight")
        rank, (rows, num_in) = layer.config.count("r"), a_RI.shape
        if b_ORk.dim() not in (2, 3) or any(size != 1 for size in b_ORk.shape[2:]) or 0 in (*b_ORk.shape, rows, num_in):
            raise AdapterCorrupt(f"{layer.where}: B has shape {tuple(b_ORk.shape)}, not (outputs, r, 1)")
        b_PR = b_ORk.flatten(1)
        if rows != rank * sum(used) or rows % b_PR.shape[1] or b_PR.shape[0] % sum(used):
            raise AdapterCorrupt(
                f"{layer.where}: A has shape {tuple(a_RI.shape)} and B {tuple(b_ORk.shape)}, which are not the factors of "
                f"{sum(used)} parts of rank {rank}"
            )
        settings = parse({**layer.config.fields, "enable_lora": None}, layer.config.folder)
        b_OR = _spread(_ungrouped(b_PR, rows, layer), used)
        return plain(a_RI, b_OR * (settings.alpha / rank))

    @classmethod
    def _config(cls, folder: Path) -> Config:
        config = Config(folder, cls._fields(folder))
        settings = parse({**config.fields, "enable_lora": None}, folder)
        flags = (settings.use_dora, settings.lora_bias, settings.use_rslora)
        if any(flags) or settings.rank_pattern or settings.alpha_pattern:
            raise AdapterUnsupported(f"{folder}: enable_lora beside a field of later versions of PEFT, which is not read")
        if settings.bias != "none":
            raise AdapterUnsupported(f"{folder}: bias={settings.bias!r} beside enable_lora, which is not read")
        _used(config)
        return config


def _used(config: Config) -> list[bool]:
    value = config.fields.get("enable_lora")
    if not isinstance(value, list) or not all(isinstance(entry, bool) for entry in value) or not any(value):
        raise AdapterCorrupt(f"{config.folder}: enable_lora is {str(value)[:80]}, not a list of truth values with one true")
    return list(value)


def _ungrouped(b_PR: Tensor, rows: int, layer: Layer) -> Tensor:
    """The convolution in groups as one matrix (enabled outputs, rows of A), zero outside the groups."""
    width = b_PR.shape[1]
    groups = rows // width
    if b_PR.shape[0] % groups:
        raise AdapterCorrupt(f"{layer.where}: B has {b_PR.shape[0]} outputs, which are not {groups} equal groups")
    size = b_PR.shape[0] // groups
    b_OR = b_PR.new_zeros(b_PR.shape[0], rows)
    for group in range(groups):
        outputs = slice(group * size, (group + 1) * size)
        b_OR[outputs, group * width : (group + 1) * width] = b_PR[outputs]
    return b_OR


def _spread(b_PR: Tensor, used: list[bool]) -> Tensor:
    """The rows at their places in the whole projection."""
    given = iter(b_PR.chunk(sum(used)))
    size = b_PR.shape[0] // sum(used)
    return torch.cat([next(given) if part else b_PR.new_zeros(size, b_PR.shape[1]) for part in used])
