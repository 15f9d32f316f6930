"""The base class of LoRA's variants, and the block-diagonal matrices of two of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend import AdapterConfig, ForeignFormat, StoredLayer, parse_lora


class LoraVariant(ForeignFormat):
    """A variant of LoRA: its config is a LoRA's with one field more, which changes the tensors' meaning."""

    peft_type = "LORA"
    parts = frozenset({"lora_A.weight", "lora_B.weight"})
    field: ClassVar[str]

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return whether the config is a LoRA's with this field set."""
        return super().claims(folder, fields) and bool(fields.get(cls.field))

    @classmethod
    def settings(cls, config: AdapterConfig) -> Any:
        """Return the rest of the config, that of a LoRA."""
        return parse_lora({**config.fields, cls.field: None}, config.folder)

    @classmethod
    def scale(cls, layer: StoredLayer, rank: int) -> float:
        """Return alpha / r of a layer. Raises AdapterCorrupt if the config gives it another rank than the file."""
        settings = cls.settings(layer.config)
        expected = settings.ranks([layer.name])[layer.name]
        if expected != rank:
            raise AdapterCorrupt(f"{layer.where} has rank {rank} in the file and rank {expected} in adapter_config.json")
        scale: float = settings.scales({layer.name: rank})[layer.name]
        return scale

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = cls._own_config(folder)
        settings = cls.settings(config)
        flags: dict[str, Any] = {"use_dora": settings.use_dora, "lora_bias": settings.lora_bias}
        for name, value in {**flags, "bias": settings.bias != "none" and settings.bias}.items():
            if value:
                raise AdapterUnsupported(f"{folder}: {name}={value!r} beside {cls.field}, which is not supported")
        settings.require_plain_activation(cls.field)
        return config


def block_diagonal(rows: Tensor, blocks: int, where: str) -> Tensor:
    """Return the block-diagonal matrix whose blocks `rows` has one below the other: (rows, blocks * columns).

    Raises AdapterCorrupt if the rows do not divide into the blocks.
    """
    if blocks < 1 or rows.shape[0] % blocks:
        raise AdapterCorrupt(f"{where}: a factor of shape {tuple(rows.shape)} does not divide into {blocks} equal blocks")
    whole: Tensor = torch.block_diag(*rows.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole
