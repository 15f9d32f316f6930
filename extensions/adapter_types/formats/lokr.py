"""LoKr (Yeh et al. 2023, arXiv 2309.14859): the Kronecker product of two matrices, either of which may be of low rank."""

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, check_size, peft_type, plain_factors


@peft_type(
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
    "r alpha rank_pattern alpha_pattern rank_dropout module_dropout rank_dropout_scale use_effective_conv2d "
    "decompose_both decompose_factor",
)
def lokr(layer: StoredLayer) -> Factors:
    """Return alpha/r W1 (x) W2: exactly of rank(W1) rank(W2), since (PQ) (x) (RS) = (P (x) R)(Q (x) S)."""
    if layer.has("lokr_t2") or layer.tensors.get("lokr_w2", torch.zeros(1, 1)).dim() != 2:
        raise AdapterUnsupported(
            f"{layer.where} is a convolution whose kernel is part of the Kronecker product, which is not supported"
        )
    (p, q), (r, s) = _factors(layer, "lokr_w1"), _factors(layer, "lokr_w2")
    alpha = layer.config.matched("alpha_pattern", layer.name, "alpha")
    rank = layer.config.matched("rank_pattern", layer.name, "r")
    if rank < 1:
        raise AdapterCorrupt(f"{layer.where}: r is {rank:g}, below 1")
    check_size(layer, p.shape[0] * r.shape[0], q.shape[1] * s.shape[1])
    return plain_factors(torch.kron(q, s), torch.kron(p, r) * (alpha / rank))


def _factors(layer: StoredLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return (left, right) whose product is the matrix `name`; one is the identity if the file has the whole matrix."""
    if layer.has(name):
        whole = layer.part(name, None, None)
        rows, columns = whole.shape
        identity = torch.eye(min(rows, columns), dtype=whole.dtype)
        return (identity, whole) if rows <= columns else (whole, identity)
    left = layer.part(f"{name}_a", None, None)
    return left, layer.part(f"{name}_b", left.shape[1], None)
