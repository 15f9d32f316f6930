"""PVeRA, the probabilistic VeRA of PEFT 0.21: at inference, the mean of the vectors that it samples in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from loraweave import Factors
from loraweave.extend import words
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer
from loraweave.extensions.adapter_types.formats.vera import Vera


class Pvera(Vera):
    """Delta = diag(lambda_b) B diag(lambda_d) A with the first half of lambda_d and of A, which is the mean."""

    peft_type = "PVERA"
    parts = frozenset({"pvera_lambda_b", "pvera_lambda_d"})
    shared = frozenset({"pvera_A", "pvera_B"})
    fields = words("save_projection r projection_prng_key pvera_dropout d_initial generator_seed")
    refused: ClassVar[Mapping[str, str]] = {
        "sample_at_inference": "outputs are sampled, so there is no one update; save it with sample_at_inference=False"
    }

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        return cls.scaled(layer, "pvera", values_per_rank=2)
