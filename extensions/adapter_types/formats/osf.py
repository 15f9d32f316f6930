"""OSF (Nayak et al. 2025, arXiv 2504.07097): a trained copy of the weight's smallest singular values and vectors."""

import torch

from loraweave import AdapterCorrupt, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type(
    "osf_svd_params.U_low osf_svd_params.S_low osf_svd_params.V_low",
    "effective_rank rank_pattern",
    refused={"target_svd_config": "ranks by module name of another version of OSF"},
)
def osf(layer: StoredLayer) -> Factors:
    """Return trained U S V - U0 S0 V0, U0, S0, V0 the base's r smallest singular terms: exactly of rank 2 r or less."""
    s_R = layer.part("osf_svd_params.S_low", None, empty=True)
    num_out, num_in, rank = layer.base.num_outputs, layer.base.num_inputs, s_R.shape[0]
    u_OR, v_RI = layer.part("osf_svd_params.U_low", num_out, rank), layer.part("osf_svd_params.V_low", rank, num_in)
    base_u_OR, base_s_R, base_v_RI = torch.linalg.svd(layer.base.weight_OI, full_matrices=False)
    first = base_s_R.shape[0] - rank
    if first < 0:
        raise AdapterCorrupt(f"{layer.where} has {rank} singular values, more than a matrix of {num_out} x {num_in}")
    before_OR = base_u_OR[:, first:] * base_s_R[first:]
    return plain_factors(torch.cat([v_RI, base_v_RI[first:]]), torch.cat([u_OR * s_R, -before_OR], dim=1))
