"""DeLoRA (Bini et al. 2025, arXiv 2503.18225): a LoRA whose direction and strength are trained apart."""

from loraweave import Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors

# PEFT's lower bound of the norms that it divides by
SMALLEST_NORM = 1e-4


@peft_type("delora_A delora_B delora_lambda delora_w_norm", "r delora_lambda module_dropout rank_pattern lambda_pattern")
def delora(layer: StoredLayer) -> Factors:
    """Return B diag(lambda / (r |a_i| |b_i|)) A diag(|w_j|), w_j being the base's columns: exactly of rank r."""
    a_RI, b_OR = layer.pair("delora_A", "delora_B")
    norms_R = a_RI.norm(dim=1).clamp(min=SMALLEST_NORM) * b_OR.norm(dim=0).clamp(min=SMALLEST_NORM)
    scale_R = layer.part("delora_lambda", 1) / a_RI.shape[0] / norms_R
    return plain_factors(a_RI * layer.part("delora_w_norm", a_RI.shape[1]), b_OR * scale_R)
