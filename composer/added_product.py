"""A matrix product added to a matrix, by whichever library of torch is the faster one for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def added_product(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """`into` itself, with left @ right added to it; the same as `into.addmm_(left, right)` up to the order of summation.

    torch multiplies fp32 by MKL, which runs at half the speed of oneDNN on processors of AMD with AVX-512 (110 against 240
    GFLOP/s for K = 64). oneDNN is reached by the operation that torch.compile uses for linear layers; where that is
    missing, as on a GPU or in another dtype, `addmm_` it is.
    """
    linear = _onednn_linear()
    if linear is None or into_MN.dtype != torch.float32 or into_MN.device.type != "cpu" or left_MK.shape[1] == 0:
        return into_MN.addmm_(left_MK, right_KN)
    return into_MN.add_(linear(left_MK.contiguous(), right_KN.T, None, "none", [], ""))


@cache
def _onednn_linear() -> Any:
    """The operation x, w, bias, ... -> x w^T + bias; None where this torch has it not, or with another meaning."""
    try:
        operation = torch.ops.mkldnn._linear_pointwise
        x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        found = operation(x, w, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operation if found.tolist() == [[11.0, 17.0]] else None
