"""OFT (Qiu et al. 2023, arXiv 2306.07280): the layer's inputs are rotated in blocks."""

import math

import torch
from torch import Tensor

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type(
    "oft_R.weight",
    "coft eps block_share use_cayley_neumann num_cayley_neumann_terms r oft_block_size module_dropout",
    linear_only=True,
)
def oft(layer: StoredLayer) -> Dense:
    """Return W (R^T - 1), R block-diagonal with Cayley transforms of skew matrices, exact or by PEFT's Neumann series."""
    entries = layer.part("oft_R.weight", None, None)
    block = (1 + math.isqrt(1 + 8 * entries.shape[1])) // 2
    num_blocks = layer.base.num_inputs // block
    shared = layer.config.flag("block_share")
    if block * (block - 1) // 2 != entries.shape[1] or num_blocks * block != layer.base.num_inputs:
        raise AdapterCorrupt(
            f"{layer.where}: {entries.shape[1]} entries give no skew blocks of {layer.base.num_inputs} inputs"
        )
    layer.part("oft_R.weight", 1 if shared else num_blocks, None)
    skew_NBB = _skew(entries, block)
    if layer.config.flag("coft"):
        skew_NBB = _shorten(skew_NBB, layer.config.number("eps"))
    turned_NBB = _cayley(skew_NBB, layer).expand(num_blocks, block, block)
    weight_ONB = layer.base.weight_OI.reshape(-1, num_blocks, block)
    return Dense(torch.einsum("onc,nkc->onk", weight_ONB, turned_NBB).flatten(1) - layer.base.weight_OI)


def _skew(entries: Tensor, block: int) -> Tensor:
    rows, columns = torch.triu_indices(block, block, 1)
    upper_NBB = entries.new_zeros(entries.shape[0], block, block)
    upper_NBB[:, rows, columns] = entries
    return upper_NBB - upper_NBB.transpose(1, 2)


def _shorten(skew_NBB: Tensor, limit: float) -> Tensor:
    """Return the N blocks (B, B) of constrained OFT, scaled so that each has a norm of at most limit / sqrt(N)."""
    limit = limit / math.sqrt(skew_NBB.shape[0])
    norms_N11 = skew_NBB.norm(dim=(1, 2), keepdim=True)
    return torch.where(norms_N11 <= limit, skew_NBB, skew_NBB * (limit / norms_N11.clamp(min=torch.finfo().tiny)))


def _cayley(skew_NBB: Tensor, layer: StoredLayer) -> Tensor:
    """Return (1 - Q)(1 + Q)^-1, or the first terms of 1 + 2 Q + 2 Q^2 + ..., the last of which PEFT counts once."""
    one_BB = torch.eye(skew_NBB.shape[1], dtype=skew_NBB.dtype)
    if not layer.config.flag("use_cayley_neumann", True):
        exact: Tensor = torch.linalg.solve(one_BB + skew_NBB, one_BB - skew_NBB, left=False)
        return exact
    terms = layer.config.count("num_cayley_neumann_terms", 5)
    if terms < 3:
        return one_BB + (2 * skew_NBB if terms == 2 else torch.zeros_like(skew_NBB))
    # with 3 terms PEFT adds as many as with 4
    last = max(terms, 4) - 1
    powers = [torch.linalg.matrix_power(skew_NBB, power) for power in range(1, last + 1)]
    series: Tensor = one_BB + 2 * sum(powers[:-1], torch.zeros_like(skew_NBB)) + powers[-1]
    return series
