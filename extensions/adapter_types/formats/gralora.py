"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): one small LoRA for every block of the weight."""

import torch

from loraweave import AdapterCorrupt, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, check_size, peft_type, plain_factors


@peft_type(
    "gralora_A gralora_B gralora_A_general.weight gralora_B_general.weight", "alpha hybrid_r r gralora_k gralora_dropout"
)
def gralora(layer: StoredLayer) -> Factors:
    """Return k x k blocks of rank r/k each, plus a LoRA of rank hybrid_r: exactly of rank k r + hybrid_r or less."""
    a_KIR, b_KRO = layer.part("gralora_A", None, None, None), layer.part("gralora_B", None, None, None)
    num_blocks, inputs, rank = a_KIR.shape
    outputs, block_rank = b_KRO.shape[2], rank // num_blocks
    layer.part("gralora_B", num_blocks, rank, None)
    if rank % num_blocks:
        raise AdapterCorrupt(f"{layer.where}: rank {rank} is not a multiple of the {num_blocks} blocks")
    check_size(layer, rank * num_blocks, num_blocks * max(inputs, outputs))
    # rank rows by (output block m, input block n, s)
    a = a_KIR.new_zeros(num_blocks, num_blocks, block_rank, num_blocks, inputs)
    b = a_KIR.new_zeros(num_blocks, outputs, num_blocks, num_blocks, block_rank)
    for m in range(num_blocks):
        for n in range(num_blocks):
            a[m, n, :, n] = a_KIR[n, :, m * block_rank : (m + 1) * block_rank].T
            b[m, :, m, n] = b_KRO[m, n * block_rank : (n + 1) * block_rank].T
    a_RI, b_OR = a.flatten(3).flatten(0, 2), b.flatten(2).flatten(0, 1)
    hybrid = layer.config.count("hybrid_r", 0, least=0)
    if hybrid:
        a_RI = torch.cat([a_RI, layer.part("gralora_A_general.weight", hybrid, a_RI.shape[1])])
        b_OR = torch.cat([b_OR, layer.part("gralora_B_general.weight", b_OR.shape[0], hybrid)], dim=1)
    return plain_factors(a_RI, b_OR * (layer.config.number("alpha") / (rank + hybrid)))
