"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): every entry of the factors is one of a single vector's, scaled."""

from __future__ import annotations

from torch import Tensor

from loraweave.hub.formats._conversion import plain
from loraweave.hub.formats._foreign import ForeignFormat, Layer
from loraweave.types import Factors


class Unilora(ForeignFormat):
    """A = theta[places] * scales, and B likewise: exactly of rank r."""

    peft_type = "UNILORA"
    parts = frozenset({"unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"})
    shared = frozenset({"unilora_theta_d"})
    handled = frozenset({"save_indices"})
    benign = frozenset({"r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound"})

    @classmethod
    def update(cls, layer: Layer) -> Factors:
        return plain(_matrix(layer, "A"), _matrix(layer, "B"))


def _matrix(layer: Layer, side: str) -> Tensor:
    theta = layer.common("unilora_theta_d", None)
    places = layer.places(f"unilora_indices_{side}", None, None, below=theta.shape[0])
    return theta[places] * layer.part(f"unilora_scales_{side}", *places.shape)
