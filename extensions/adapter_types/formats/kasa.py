"""KaSA (Wang et al. 2024, arXiv 2412.06071): a LoRA with trained singular values, for a base without its smallest ones."""

import torch

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extensions.adapter_types.formats._foreign import LoraVariant, StoredLayer, plain_factors


class Kasa(LoraVariant):
    """Delta = alpha/r B diag(d) A, d trained, minus the base's r smallest singular terms: exactly of rank 2 r."""

    field = "kasa_config"
    parts = frozenset({"lora_A.weight", "lora_B.weight", "lora_diag"})

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        a_RI, b_OR = layer.pair("lora_A.weight", "lora_B.weight")
        rank, num_in = a_RI.shape
        diagonal_R = layer.part("lora_diag", rank)
        if layer.base.kind != "linear" or layer.base.transposed:
            raise AdapterUnsupported(f"{layer.where}: KaSA is supported for linear layers only")
        weight_OI = layer.base.weight_OI
        if tuple(weight_OI.shape) != (b_OR.shape[0], num_in) or rank >= min(weight_OI.shape):
            raise AdapterCorrupt(
                f"{layer.where}: an update of rank {rank} and shape {(b_OR.shape[0], num_in)} does not fit the base's "
                f"(O, I) = {tuple(weight_OI.shape)}"
            )
        u_OK, sigma_K, vh_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        a = torch.cat([a_RI, vh_KI[-rank:]])
        b = torch.cat([b_OR * (diagonal_R * cls.scale(layer, rank)), -u_OK[:, -rank:] * sigma_K[-rank:]], dim=1)
        return plain_factors(a, b)
