"""MoRA (Jiang et al. 2024, arXiv 2405.12130) as its authors' fork of peft saves it: one square matrix for a layer.

The square M (S, S) has about as many entries as a LoRA of rank r; inputs are compressed to S features without trained
numbers, and outputs are repeated. The file has M twice, as lora_A and as lora_B, and alpha is not used.
"""

import math

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, Factors
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import LoraVariant, StoredLayer, check_size, plain_factors

A, B = "lora_A.weight", "lora_B.weight"
# types that group every S-th input, or output; the other types group neighbours
EVERY_INPUT, EVERY_OUTPUT = (1, 4), (1, 3)
# the type that rotates blocks
TURNED = 6


class Mora(LoraVariant):
    """Delta = D M C with C and D of zeros and ones, exactly of rank S; type 6 has a rotated M in each block, of any rank.

    Type 1 adds up every S-th input, padded to a multiple of S with the first inputs, and repeats the S outputs; 2 does both
    by neighbours, 3 and 4 one of each. Type 6 rotates the b-th S inputs by b times the angles of RoPE, applies M to each,
    and repeats or cuts the outputs.
    """

    field = "use_mora"
    linear_only = True

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors | Dense:
        kind = layer.choice("mora_type", (1, 2, 3, 4, TURNED), 1)
        num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
        rank = cls.settings(layer.config).ranks([layer.name])[layer.name]
        side = int(math.sqrt((num_in + num_out) * rank) + 0.5)
        side = side // 2 * 2 if kind == TURNED else side
        square_SS = layer.part(A, side, side)
        if not torch.equal(square_SS, layer.part(B, side, side)):
            raise AdapterCorrupt(f"{layer.where}: lora_A and lora_B differ, which are MoRA's one matrix stored twice")
        if kind == TURNED:
            return Dense(_turned(layer, square_SS, num_out, num_in))
        filled = -(-num_in // side) * side if kind in EVERY_INPUT else num_in
        row_F = torch.arange(filled) % side if kind in EVERY_INPUT else _neighbours(num_in, side)
        compress_SI = square_SS.new_zeros(side, num_in)
        places = (row_F, torch.arange(filled) % num_in)
        compress_SI.index_put_(places, torch.ones(filled, dtype=compress_SI.dtype), accumulate=True)
        row_O = torch.arange(num_out) % side if kind in EVERY_OUTPUT else _neighbours(num_out, side)
        return plain_factors(square_SS @ compress_SI, torch.eye(side, dtype=square_SS.dtype)[row_O])


def _neighbours(size: int, count: int) -> Tensor:
    """Return each feature's group number (size,): `count` groups of neighbours; the first groups may have one more."""
    larger = torch.arange(count) < size % count
    return torch.arange(count).repeat_interleave(size // count + larger.long())


def _turned(layer: StoredLayer, square_SS: Tensor, num_out: int, num_in: int) -> Tensor:
    """Return the update (O, I) of type 6: M rotated in each block of the diagonal, folded and repeated to (O, I)."""
    side = len(square_SS)
    blocks, half = -(-num_in // side), side // 2
    check_size(layer, blocks * side, blocks * side)
    angle_BH = torch.arange(blocks)[:, None] * 10000.0 ** (-torch.arange(0, side, 2, dtype=torch.float64) / side)
    one_SH, other_SH = square_SS[:, :half], square_SS[:, half:]
    turned = [
        torch.cat([one_SH * cos_H + other_SH * sin_H, other_SH * cos_H - one_SH * sin_H], dim=1)
        for cos_H, sin_H in zip(angle_BH.cos(), angle_BH.sin(), strict=True)
    ]
    whole: Tensor = torch.block_diag(*turned)  # type: ignore[no-untyped-call]
    delta_FI = whole[:, :num_in].clone()
    delta_FI[:, : whole.shape[1] - num_in] += whole[:, num_in:]
    return delta_FI[torch.arange(num_out) % len(delta_FI)]
