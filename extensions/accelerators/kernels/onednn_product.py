"""The product of factors that `fused` adds to weights, by oneDNN, which is faster than MKL on some processors.

torch multiplies fp32 by MKL, which runs at half the speed of oneDNN on processors of AMD with AVX-512 (110 against 240
GFLOP/s for K = 64). oneDNN is reached by the operation that torch.compile uses for linear layers. Its twin is `addmm_`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


class OnednnProduct:
    """The product of two fp32 matrices on a CPU."""

    @staticmethod
    def add_product(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> bool:
        """Add left @ right to `into_MN` in place, like `addmm_` up to the order of sums.

        Returns False, with nothing added, unless `into_MN` is fp32 on a CPU, K > 0 and torch has oneDNN.
        """
        linear = _onednn_linear()
        if linear is None or into_MN.dtype != torch.float32 or into_MN.device.type != "cpu" or left_MK.shape[1] == 0:
            return False
        into_MN.add_(linear(left_MK.contiguous(), right_KN.T, None, "none", [], ""))
        return True


@cache
def _onednn_linear() -> Any:
    """Return the operation x, w, bias, ... -> x w^T + bias; None where this torch lacks it or means something else."""
    try:
        operation = torch.ops.mkldnn._linear_pointwise
        x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        product = operation(x, w, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operation if product.tolist() == [[11.0, 17.0]] else None
