"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604) as its authors store it: a LoRA with a trained matrix between A and B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraweave import AdapterCorrupt, Factors
from loraweave.extend import AdapterConfig, parse_lora, stored_names
from loraweave.extensions.adapter_types.formats._foreign import (
    ForeignFormat,
    StoredLayer,
    plain_factors,
    require_plain_activation,
)

MIDDLE = "default_lora_latent_mapping.weight"
# older versions of PEFT remove ".default" from every tensor name, this one's too
GLUED = "_lora_latent_mapping.weight"


class LoraXs(ForeignFormat):
    """Delta = alpha/r B R A, A and B being singular vectors of the base that the file holds: exactly of rank r."""

    peft_type = "LORA"
    parts = frozenset({"lora_A.weight", "lora_B.weight", MIDDLE})

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return whether the folder is a LoRA whose file has a matrix between A and B."""
        try:
            return super().claims(folder, fields) and any(name.endswith(GLUED) for name in stored_names(folder))
        except ValueError:
            return False

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        a_RI, b_OR = layer.pair("lora_A.weight", "lora_B.weight")
        rank = a_RI.shape[0]
        middle_RR = layer.part(MIDDLE, rank, rank)
        settings = parse_lora(layer.config.fields, layer.config.folder)
        if settings.ranks([layer.name])[layer.name] != rank:
            raise AdapterCorrupt(f"{layer.where} has rank {rank}, which is not what adapter_config.json gives it")
        return plain_factors(a_RI, b_OR @ middle_RR * settings.scales({layer.name: rank})[layer.name])

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = cls._own_config(folder)
        settings = parse_lora(config.fields, folder)
        if settings.use_dora or settings.lora_bias:
            raise AdapterCorrupt(f"{folder}: LoRA-XS has neither use_dora nor lora_bias")
        require_plain_activation(settings, "LoRA-XS's middle matrix")
        return config

    @classmethod
    def _place(cls, key: str, folder: Path) -> tuple[str | None, str]:
        if key.endswith(GLUED) and not key.endswith(f".{MIDDLE}"):
            key = f"{key.removesuffix(GLUED)}.{MIDDLE}"
        return super()._place(key, folder)
