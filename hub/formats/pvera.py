"""PVeRA, the probabilistic VeRA of PEFT 0.21: at inference it takes the mean of what it samples in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from loraweave.hub.formats._conversion import plain
from loraweave.hub.formats._foreign import ForeignFormat, Layer
from loraweave.hub.formats.vera import projections
from loraweave.types import Factors


class Pvera(ForeignFormat):
    """Delta = diag(lambda_b) B diag(lambda_d) A with the first half of lambda_d and of A, which is the mean."""

    peft_type = "PVERA"
    parts = frozenset({"pvera_lambda_b", "pvera_lambda_d"})
    shared = frozenset({"pvera_A", "pvera_B"})
    handled = frozenset({"save_projection"})
    benign = frozenset({"r", "projection_prng_key", "pvera_dropout", "d_initial", "generator_seed"})
    refused: ClassVar[Mapping[str, str]] = {
        "sample_at_inference": "outputs are sampled, so there is no one update; save it with sample_at_inference=False"
    }

    @classmethod
    def update(cls, layer: Layer) -> Factors:
        num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
        a_RI, b_OR = projections(layer, "pvera_A", "pvera_B")
        rank = layer.part("pvera_lambda_d", None).shape[0] // 2
        lambda_b_O, lambda_d_R = layer.part("pvera_lambda_b", num_out), layer.part("pvera_lambda_d", 2 * rank)[:rank]
        return plain(lambda_d_R[:, None] * a_RI[:rank, :num_in], lambda_b_O[:, None] * b_OR[:num_out, :rank])
