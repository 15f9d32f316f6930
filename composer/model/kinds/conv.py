"""Convolutions in one to three dimensions: the rank rows are output channels, the tokens are the output positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.model.kinds._kind import Shape
from loraweave.types import Kind

name: Kind = "conv"
modules = "torch.nn.Conv1d, Conv2d and Conv3d"

_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def shape(module: nn.Module) -> Shape | None:
    """(output channels, input channels of a group * kernel size); None for any other module."""
    if isinstance(module, _CLASSES):
        kernel = tuple(int(size) for size in module.kernel_size)
        inputs = module.in_channels // module.groups * torch.Size(kernel).numel()
        return Shape(int(module.out_channels), inputs, kernel=kernel)
    return None


def refusal(module: Any) -> str:
    """Not exact are a convolution in groups, whose weight is not one matrix, and one that does more than convolve."""
    if module.groups > 1:
        return f"whose groups={module.groups} see different channels, so that its weight is no single matrix"
    plain = _CLASSES[len(module.kernel_size) - 1]
    if type(module).forward is not plain.forward or type(module)._conv_forward is not plain._conv_forward:
        return "whose forward is its own, and may do more than convolve with its weight"
    return ""


def project(module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
    """hidden_BTS: the convolution with a as its weight, with the stride, padding and dilation of the layer."""
    kernels = a_SI.reshape(-1, module.in_channels, *module.kernel_size)
    return rows(module, module._conv_forward(x.to(a_SI.dtype), kernels, None))


def inputs(module: Any, x: Tensor, like: Tensor) -> Tensor:
    """The patch below the kernel at each output position, gathered by a convolution with the identity."""
    num_inputs = module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
    return project(module, x, torch.eye(num_inputs, dtype=like.dtype, device=like.device))


def middle(module: Any, x: Tensor, like: Tensor) -> Tensor:
    """x_BTC: the channels below the middle of the kernel at each output position, with the dtype of `like`."""
    kernel = torch.zeros(1, 1, *module.kernel_size, dtype=like.dtype, device=like.device)
    kernel.view(-1)[kernel.numel() // 2] = 1
    # each channel as a row of its own, as the layer pads and strides all alike
    x_BC = (x if x.ndim == 2 + len(module.kernel_size) else x[None]).to(like.dtype)
    found: Tensor = module._conv_forward(x_BC.flatten(0, 1)[:, None], kernel, None)
    return found.reshape(*x_BC.shape[:2], -1).mT


def rows(module: Any, y: Tensor) -> Tensor:
    """The output's channels by row and position; an output without a batch axis is one row."""
    return (y if y.ndim == 2 + len(module.kernel_size) else y[None]).flatten(2).mT


def put_back(y_BTO: Tensor, y: Tensor) -> Tensor:
    """The values in the shape of y, and as contiguous as y is."""
    found = y_BTO.mT.reshape(y.shape)
    return found.contiguous() if y.is_contiguous() else found
