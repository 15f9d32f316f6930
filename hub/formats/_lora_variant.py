"""What the variants of LoRA share whose config is a LoRA's with one field more that changes what the tensors mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._config import Config
from loraweave.hub.formats._foreign import ForeignFormat, Layer
from loraweave.hub.formats._peft_config import PeftConfig, parse


class LoraVariant(ForeignFormat):
    """A format of peft_type LORA that its own field of the config marks."""

    peft_type = "LORA"
    parts = frozenset({"lora_A.weight", "lora_B.weight"})
    field: ClassVar[str]

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Whether the config is a LoRA's with this field set."""
        return super().claims(folder, fields) and bool(fields.get(cls.field))

    @classmethod
    def settings(cls, config: Config) -> PeftConfig:
        """The rest of the config, that of a LoRA."""
        return parse({**config.fields, cls.field: None}, config.folder)

    @classmethod
    def scale(cls, layer: Layer, rank: int) -> float:
        """alpha / r of a layer. Raises AdapterCorrupt where the config gives it another rank than the file."""
        settings = cls.settings(layer.config)
        expected = settings.ranks([layer.name])[layer.name]
        if expected != rank:
            raise AdapterCorrupt(f"{layer.where} has rank {rank} in the file and rank {expected} in adapter_config.json")
        return settings.scales({layer.name: rank})[layer.name]

    @classmethod
    def _config(cls, folder: Path) -> Config:
        config = cls._own_config(folder)
        settings = cls.settings(config)
        flags: dict[str, Any] = {"use_dora": settings.use_dora, "lora_bias": settings.lora_bias}
        for name, value in {**flags, "bias": settings.bias != "none" and settings.bias}.items():
            if value:
                raise AdapterUnsupported(f"{folder}: {name}={value!r} beside {cls.field}, which is not read")
        return config


def block_diagonal(rows: Tensor, blocks: int, where: str) -> Tensor:
    """The matrix of which only the blocks on the diagonal are stored, one below the other: (rows, blocks * columns).

    Raises AdapterCorrupt where the rows do not divide.
    """
    if blocks < 1 or rows.shape[0] % blocks:
        raise AdapterCorrupt(f"{where}: a factor of shape {tuple(rows.shape)} does not divide into {blocks} equal blocks")
    height, width = rows.shape[0] // blocks, rows.shape[1]
    whole = rows.new_zeros(rows.shape[0], blocks * width)
    for block in range(blocks):
        here = slice(block * height, (block + 1) * height)
        whole[here, block * width : (block + 1) * width] = rows[here]
    return whole
