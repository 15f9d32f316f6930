"""LoRA of PEFT before 0.3 on a fused projection: factors for some of its equal parts (`enable_lora`), as in loralib."""

from pathlib import Path

import torch

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend.formats import AdapterConfig, entry
from loraweave.extensions.adapter_types.formats._foreign import LoraVariant, StoredLayer, block_diagonal, plain_factors


class MergedLinear(LoraVariant):
    """Delta = alpha/r B A in each part of the outputs that `enable_lora` selects, else 0: exactly of rank r x parts in use.

    The outputs are divided into as many equal runs as the list has entries, whatever the base has there. A has r rows for
    every part in use, and B is a convolution of width 1 in groups, each over its own rows of A.
    """

    field = "enable_lora"

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        used = _parts_in_use(layer.config)
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
        b_UPR = block_diagonal(b_PR, rows // b_PR.shape[1], layer.where).reshape(sum(used), -1, rows)
        b_OR = b_UPR.new_zeros(len(used), *b_UPR.shape[1:])
        b_OR[torch.tensor(used)] = b_UPR
        b_OR = b_OR.flatten(0, 1)
        return plain_factors(a_RI, b_OR * (cls.settings(layer.config).alpha / rank))

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = super()._config(folder)
        settings = cls.settings(config)
        if settings.use_rslora or settings.rank_pattern or settings.alpha_pattern:
            raise AdapterUnsupported(
                f"{folder}: enable_lora beside a field of later versions of PEFT, which is not supported"
            )
        return config


def _parts_in_use(config: AdapterConfig) -> list[bool]:
    used = entry(config.fields, "enable_lora", list) or []
    if not any(used) or any(type(part) is not bool for part in used):
        raise AdapterCorrupt(f"{config.folder}: enable_lora is not a list of truth values with one true")
    return used
