"""The live mixture written as its formula: the specification that every faster kernel must equal."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def naive(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """Return ((x a^T) * w) b^T as (B, T, O): the weighted updates of all rank rows; B and T of w may be 1.

    x, a and b share a dtype, in which the two products run. The weights are applied in fp32 or better. A rank row of
    weight zero adds exactly nothing, even where its hidden value has overflowed.
    """
    return linear(mix(linear(x_BTI, a_SI), w_BTS), b_OS)


def mix(hidden_BTS: Tensor, w_BTS: Tensor) -> Tensor:
    """Return the hidden values times their weights, in the dtype of the hidden values."""
    mixed_BTS = hidden_BTS.to(torch.promote_types(hidden_BTS.dtype, torch.float32)) * w_BTS
    # a weight that learns keeps its gradient at zero
    if not w_BTS.requires_grad:
        mixed_BTS = mixed_BTS.masked_fill(w_BTS == 0, 0.0)
    return mixed_BTS.to(hidden_BTS.dtype)
