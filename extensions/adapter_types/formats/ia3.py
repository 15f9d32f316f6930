"""(IA)3 (Liu et al. 2022, arXiv 2205.05638): trained scales of a layer's outputs, or of its inputs."""

from loraweave import Factors
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type("ia3_l", "feedforward_modules init_ia3_weights", linear_only=True)
def ia3(layer: StoredLayer) -> Factors | Dense:
    """Return scaled outputs y * l as a gain of l - 1, also of the base's bias; scaled inputs x * l as W diag(l - 1)."""
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    scales = layer.part("ia3_l", None, None)
    # PEFT stores (O, 1) for outputs and (1, I) for inputs
    if tuple(scales.shape) == (num_out, 1):
        gain_O, bias_O = scales[:, 0] - 1, layer.base.bias_O
        return plain_factors(
            scales.new_zeros(0, num_in),
            scales.new_zeros(num_out, 0),
            gain_O=gain_O,
            bias_O=None if bias_O is None else gain_O * bias_O,
        )
    return Dense(layer.base.weight_OI * (layer.part("ia3_l", 1, num_in) - 1))
