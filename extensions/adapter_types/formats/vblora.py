"""VB-LoRA (Li et al. 2024, arXiv 2405.15179): factors made of a few vectors of one bank, mixed per sub-vector."""

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type(
    " ".join(f"vblora_logits_{side}{form}" for side in "AB" for form in ("", "_topk_indices", "_topk_weights")),
    "topk r num_vectors vector_length save_only_topk_weights vblora_dropout init_vector_bank_bound init_logits_std",
    shared="vblora_vector_bank",
)
def vblora(layer: StoredLayer) -> Factors:
    """Return A and B, whose sub-vectors are softmax(top-k logits) times the bank's vectors: exactly of rank r."""
    bank_VL = layer.part("vblora_vector_bank", None, None)
    a, b = _mix(layer, "A", bank_VL), _mix(layer, "B", bank_VL)
    if a.shape[0] != b.shape[1]:
        raise AdapterCorrupt(f"{layer.where}: A has rank {a.shape[0]} and B has rank {b.shape[1]}")
    return plain_factors(a.flatten(1), b.transpose(1, 2).reshape(-1, b.shape[1]))


def _mix(layer: StoredLayer, side: str, bank_VL: Tensor) -> Tensor:
    """Return the sub-vectors of factor `side` ("A" or "B"), as (rows, columns of sub-vectors, length of one).

    Each mixes `topk` of the V vectors of the bank.
    """
    name, topk = f"vblora_logits_{side}", layer.config.count("topk", 2)
    if topk > bank_VL.shape[0]:
        raise AdapterCorrupt(f"{layer.where}: topk is {topk}, but the bank has {bank_VL.shape[0]} vectors")
    if layer.has(name):
        logits, places = layer.part(name, None, None, bank_VL.shape[0]).topk(topk, dim=-1)
        weights = logits.softmax(-1)
    else:
        places = layer.places(f"{name}_topk_indices", None, None, topk, below=bank_VL.shape[0])
        stored = layer.part(f"{name}_topk_weights", *places.shape[:2], topk - 1)
        # PEFT omits the last weight, since they sum to 1
        weights = torch.cat([stored, 1 - stored.sum(-1, keepdim=True)], dim=-1)
    return (weights[..., None] * bank_VL[places]).sum(-2)
