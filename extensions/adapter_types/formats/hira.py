"""HiRA (Huang et al. 2025, OpenReview TwJrTz9cRS): the base's weight times a low-rank matrix, elementwise."""

from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type("hira_A hira_B", "r hira_dropout rank_pattern", linear_only=True)
def hira(layer: StoredLayer) -> Dense:
    """Return W * (B A) elementwise, of rank r times that of W: cut to `max_error`."""
    a_RI = layer.part("hira_A", None, layer.base.num_inputs)
    return Dense(layer.base.weight_OI * (layer.part("hira_B", layer.base.num_outputs, a_RI.shape[0]) @ a_RI))
