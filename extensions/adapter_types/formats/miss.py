"""MiSS (Kang and Yin 2024, arXiv 2409.15371), once called Bone: one small matrix repeated along the inputs."""

import torch

from loraweave import AdapterCorrupt, Factors
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type("miss_block", "init_weights mini_r r miss_dropout")
def miss(layer: StoredLayer) -> Factors | Dense:
    """Return trained D[i mod r, o] at (o, i), of rank r; "bat" has W_nm D_m + D_m in block (m, n) and needs the weights."""
    form = layer.choice("init_weights", (True, False, "bat", "mini"), True)
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    if form == "bat":
        return _bat(layer)
    d_RO = layer.part("miss_block", None, None)
    rank, width = d_RO.shape
    if width != num_out and (form != "mini" or num_out % width):
        raise AdapterCorrupt(f"{layer.where}: miss_block has {width} columns for a layer of {num_out} outputs")
    repeated_RI = torch.eye(rank, dtype=d_RO.dtype)[:, torch.arange(num_in) % rank]
    return plain_factors(repeated_RI, d_RO.repeat(1, num_out // width).T)


def _bat(layer: StoredLayer) -> Dense:
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    d_MBB = layer.part("miss_block", None, None, None)
    block = d_MBB.shape[2]
    layer.part("miss_block", num_out // block, block, block)
    if num_out % block or num_in % block:
        raise AdapterCorrupt(f"{layer.where}: blocks of {block} do not divide the layer's (O, I) = {(num_out, num_in)}")
    w_NMBB = layer.base.weight_OI.reshape(num_out // block, block, num_in // block, block).permute(2, 0, 1, 3)
    delta_NMBB = w_NMBB @ d_MBB + d_MBB
    return Dense(delta_NMBB.permute(1, 2, 0, 3).reshape(num_out, num_in))
