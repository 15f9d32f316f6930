"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): every entry of the factors is an entry of one shared vector, scaled."""

from typing import NoReturn

from torch import Tensor

from loraweave import AdapterUnsupported, Factors
from loraweave.extend.formats import AdapterConfig, words
from loraweave.extensions.adapter_types.formats._foreign import ForeignFormat, StoredLayer, plain_factors


class Unilora(ForeignFormat):
    """Delta = B A, exactly of rank r: A = theta[places] * scales, B likewise, theta a trained vector for all layers."""

    peft_type = "UNILORA"
    parts = frozenset({"unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"})
    shared = frozenset({"unilora_theta_d"})
    fields = words("save_indices r proj_seed theta_d_length unilora_dropout init_theta_d_bound")

    @classmethod
    def _refuse_without_layers(cls, config: AdapterConfig) -> NoReturn:
        if config.flag("save_indices"):
            super()._refuse_without_layers(config)
        raise AdapterUnsupported(
            f"{config.folder}: save_indices is false, so the file holds the shared vector without the places that each "
            "layer takes of it, which PEFT draws again from proj_seed; train with UniLoraConfig(save_indices=True), or load "
            "this one with PEFT onto a copy of the base: lw.extract(base, loaded.merge_and_unload()) makes factors of it"
        )

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        return plain_factors(_matrix(layer, "A"), _matrix(layer, "B"))


def _matrix(layer: StoredLayer, side: str) -> Tensor:
    theta = layer.part("unilora_theta_d", None)
    places = layer.places(f"unilora_indices_{side}", None, None, below=theta.shape[0])
    return theta[places] * layer.part(f"unilora_scales_{side}", *places.shape)
