"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604) as its authors store it: a LoRA with a trained matrix between A and B."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraweave import Factors
from loraweave.extend.formats import AdapterConfig, parse_lora, stored_names
from loraweave.extensions.adapter_types.formats._foreign import LoraVariant, StoredLayer, plain_factors

MIDDLE = "default_lora_latent_mapping.weight"
# older versions of PEFT remove ".default" from every tensor name, this one's too
GLUED = "_lora_latent_mapping.weight"


class LoraXs(LoraVariant):
    """Delta = alpha/r B R A, A and B being singular vectors of the base that the file holds: exactly of rank r."""

    # no field of the config tells it, so this is for error texts alone
    field = "LoRA-XS's middle matrix"
    parts = frozenset({"lora_A.weight", "lora_B.weight", MIDDLE})

    @classmethod
    def settings(cls, config: AdapterConfig) -> Any:
        return parse_lora(config.fields, config.folder)

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return True if the folder is a LoRA whose file has a matrix between A and B."""
        try:
            return fields.get("peft_type") == cls.peft_type and any(name.endswith(GLUED) for name in stored_names(folder))
        except ValueError:
            return False

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        a_RI, b_OR = layer.pair("lora_A.weight", "lora_B.weight")
        rank = a_RI.shape[0]
        return plain_factors(a_RI, b_OR @ layer.part(MIDDLE, rank, rank) * cls.scale(layer, rank))

    @classmethod
    def _place(cls, key: str, folder: Path) -> tuple[str | None, str]:
        if key.endswith(GLUED) and not key.endswith(f".{MIDDLE}"):
            key = f"{key.removesuffix(GLUED)}.{MIDDLE}"
        return super()._place(key, folder)
