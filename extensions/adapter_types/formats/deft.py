"""DEFT (PEFT 0.21): the weight's part in a small subspace of its outputs, replaced by a trained one."""

import torch

from loraweave import Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type("deft_P deft_R", "decomposition_method alpha para r init_scale deft_dropout")
def deft(layer: StoredLayer) -> Factors:
    """Return Q (s R - P^T W), R trained, s = alpha/r or 1, Q and P by QR or ReLU of a trained matrix: exactly of rank r."""
    p_OR = layer.part("deft_P", layer.base.num_outputs, None)
    rank = p_OR.shape[1]
    if layer.choice("decomposition_method", ("relu", "qr"), "relu") == "qr":
        left_OR = right_OR = torch.linalg.qr(p_OR)[0]
    else:
        left_OR, right_OR = p_OR, p_OR.relu()
    a_RI = -right_OR.T @ layer.base.weight_OI
    if not layer.config.flag("para"):
        alpha = layer.config.number("alpha", 0.0) if layer.config.fields.get("alpha") is not None else 0.0
        # PEFT treats an alpha of 0 as no alpha
        a_RI = a_RI + layer.part("deft_R", rank, layer.base.num_inputs) * (alpha / rank if alpha else 1.0)
    return plain_factors(a_RI, left_OR)
