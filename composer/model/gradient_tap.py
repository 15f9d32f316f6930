"""The gradient at a layer's output, handed on as a backward pass goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# gradient at the output, input of the layer
Receiver = Callable[[Tensor, Tensor], None]


class GradientTap(torch.autograd.Function):
    """The identity on a layer's output, which hands the gradient that passes, and the layer's input, to a receiver.

    `wanted` is any tensor that requires a gradient: an edge of the graph that makes the backward pass reach it, although
    neither the model's parameters nor its inputs want one.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor, x: Tensor, receiver: Receiver) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receiver = receiver
        # a copy: a view that a custom function returns may not be changed in place, as some models do next
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.receiver(gradients[0], x)
        return gradients[0], None, None, None
