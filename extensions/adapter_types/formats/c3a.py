"""C3A (Chen et al. 2024, arXiv 2407.19342): every block of the update is a circulant matrix."""

import torch

from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, check_size, peft_type


@peft_type("c3a_kernel", "block_size block_size_pattern")
def c3a(layer: StoredLayer) -> Dense:
    """Return blocks (m, n), b x b, with trained w[m, n, (k - j) mod b] / I at (j, k); I is the number of inputs."""
    kernel_MNB = layer.part("c3a_kernel", None, None, None)
    block = kernel_MNB.shape[2]
    check_size(layer, kernel_MNB.shape[0] * block, kernel_MNB.shape[1] * block)
    steps_B = torch.arange(block)
    turned_MNBB = kernel_MNB[:, :, (steps_B[None, :] - steps_B[:, None]) % block]
    delta_OI = turned_MNBB.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return Dense(delta_OI / delta_OI.shape[1])
