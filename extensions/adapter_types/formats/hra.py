"""HRA (Yuan et al. 2024, arXiv 2405.17484): the weight times a chain of Householder reflections."""

import torch

from loraweave import AdapterCorrupt, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type("hra_u", "apply_GS r")
def hra(layer: StoredLayer) -> Factors:
    """Return W (H_1 ... H_r - 1), H_i = 1 - 2 u_i u_i^T: exactly of rank r, since each step subtracts 2 (W' u_i) u_i^T."""
    u_IR = layer.part("hra_u", layer.base.num_inputs, None)
    norms_R = u_IR.norm(dim=0)
    if not bool(norms_R.all()):
        raise AdapterCorrupt(f"{layer.where}: reflection {int((norms_R == 0).nonzero()[0])} has a vector of zeros")
    # Gram-Schmidt by QR, whose signs do not matter for reflections
    u_IR = torch.linalg.qr(u_IR)[0] if layer.config.flag("apply_GS") else u_IR / norms_R
    images_OR = layer.base.weight_OI @ u_IR
    gram_RR = u_IR.T @ u_IR
    b_OR = torch.zeros_like(images_OR)
    for step in range(u_IR.shape[1]):
        # W' u of this step, W' being W after the reflections before it
        b_OR[:, step] = -2 * (images_OR[:, step] + b_OR[:, :step] @ gram_RR[:step, step])
    return plain_factors(u_IR.T, b_OR)
