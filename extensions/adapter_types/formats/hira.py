"""HiRA (Huang et al. 2025, OpenReview TwJrTz9cRS): the base's weight times a low-rank matrix, elementwise."""

from __future__ import annotations

from loraweave.extend import Dense, words
from loraweave.extensions.adapter_types.formats._foreign import ForeignFormat, StoredLayer


class Hira(ForeignFormat):
    """Delta = W * (B A) elementwise, of rank r times that of W: cut to `max_error`."""

    peft_type = "HIRA"
    parts = frozenset({"hira_A", "hira_B"})
    fields = words("r hira_dropout rank_pattern")
    linear_only = True

    @classmethod
    def update(cls, layer: StoredLayer) -> Dense:
        a_RI = layer.part("hira_A", None, layer.base.num_inputs)
        return Dense(layer.base.weight_OI * (layer.part("hira_B", layer.base.num_outputs, a_RI.shape[0]) @ a_RI))
