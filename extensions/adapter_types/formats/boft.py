"""BOFT (Liu et al. 2023, arXiv 2311.06243): inputs rotated by a product of butterfly factors, and outputs scaled."""

import torch
from torch import Tensor

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type("boft_R boft_s", "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout", linear_only=True)
def boft(layer: StoredLayer) -> Dense:
    """Return diag(s) W R^T - W, s trained, R = B_m ... B_1, each a block-diagonal Cayley transform between permutations."""
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    stored = layer.part("boft_R", None, None, None, None)
    factors, blocks, block, _ = stored.shape
    layer.part("boft_R", factors, blocks, block, block)
    if blocks * block != num_in or (factors > 1 and (block % 2 or blocks % 2 ** (factors - 1))):
        raise AdapterCorrupt(f"{layer.where}: {factors} factors of {blocks} blocks of {block} do not fit {num_in} inputs")
    skew = (stored - stored.transpose(2, 3)) / 2
    one_BB = torch.eye(block, dtype=stored.dtype)
    turned = torch.linalg.solve(one_BB + skew, one_BB - skew, left=False)
    result_OI = layer.base.weight_OI
    # W R^T = (W B_m^T ...) is applied from the last factor, since R^T = B_1^T ... B_m^T acts on W from the right
    for level in range(factors):
        result_OI = _rotated(result_OI, turned[level], _order(num_in, block, level))
    return Dense(result_OI * layer.part("boft_s", num_out, 1) - layer.base.weight_OI)


def _rotated(matrix_OI: Tensor, turned_NBB: Tensor, order_I: Tensor) -> Tensor:
    """Return matrix P D^T P^T (O, I), where P has ones at (i, order[i]) and D has the N blocks (B, B) on its diagonal."""
    apart_OI = torch.empty_like(matrix_OI)
    apart_OI[:, order_I] = matrix_OI
    blocks_ONB = apart_OI.reshape(apart_OI.shape[0], *turned_NBB.shape[:2])
    return torch.einsum("onc,nkc->onk", blocks_ONB, turned_NBB).flatten(1)[:, order_I]


def _order(num_in: int, block: int, level: int) -> Tensor:
    """Return the butterfly permutation of a level as indices of inputs (I,); at level 0 it is the identity.

    In each group of 2^level blocks of `block` inputs, the half blocks of even index come first, then those of odd index.
    """
    if level == 0:
        return torch.arange(num_in)
    return torch.arange(num_in).view(-1, 2**level, 2, block // 2).transpose(1, 2).flatten()
