"""BEFT (PEFT 0.21): a trained bias that is added to a layer's output."""

from loraweave import Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type("beft_bias")
def beft(layer: StoredLayer) -> Factors:
    """Return the trained bias as an update of rank 0, exactly."""
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    bias_O = layer.part("beft_bias", 1, num_out)[0]
    return plain_factors(bias_O.new_zeros(0, num_in), bias_O.new_zeros(num_out, 0), bias_O=bias_O)
