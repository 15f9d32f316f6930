"""GLoRA (Chavan et al. 2023, arXiv 2306.07967): weight and bias scaled and shifted by trained terms."""

from torch import Tensor

from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type

NAMES = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")


@peft_type(
    " ".join(f"{name}.{form}" for name in NAMES for form in ("Xd", "Xu", "X", "zeros")), "r config_A_B config_C config_D_E"
)
def glora(layer: StoredLayer) -> Dense:
    """Return W * A + B elementwise, and of the bias b * D + E + W C; terms are low-rank, vectors, numbers or absent."""
    weight_OI, bias_O = layer.base.weight_OI, layer.base.bias_O
    delta_OI = weight_OI * _term(layer, "glora_A") + _term(layer, "glora_B")
    if bias_O is None:
        # PEFT gives no bias to a layer without one
        return Dense(delta_OI)
    through_O1 = weight_OI @ _term(layer, "glora_C").expand(weight_OI.shape[1], 1)
    return Dense(delta_OI, bias_O * _term(layer, "glora_D") + _term(layer, "glora_E") + through_O1[:, 0])


def _term(layer: StoredLayer, name: str) -> Tensor:
    """Return the trained term `name`: a product of factors, or the stored vector or number (1,), or zeros."""
    if layer.has(f"{name}.Xd"):
        down = layer.part(f"{name}.Xd", None, None)
        return down @ layer.part(f"{name}.Xu", down.shape[1], None)
    if layer.has(f"{name}.X"):
        return layer.part(f"{name}.X")
    return layer.part(f"{name}.zeros") * 0
