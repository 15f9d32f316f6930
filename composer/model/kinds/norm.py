"""Layer norms: no update of a matrix, but a trained bias (peft's bias="all"), which is what such an adapter has of them."""

from __future__ import annotations

from torch import Tensor, nn

from loraweave.composer.model.kinds._kind import Shape, by_row
from loraweave.types import Kind

# of an update without rank rows
name: Kind = "linear"
modules = "torch.nn.LayerNorm"


def shape(module: nn.Module) -> Shape | None:
    """(features, 0) of a layer norm over the last axis; None for any other module."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Shape(int(module.normalized_shape[0]), 0)
    return None


def refusal(module: nn.Module) -> str:
    """Not exact is a norm whose forward may do more."""
    if type(module).forward is not nn.LayerNorm.forward:
        return "whose forward is its own, and may do more than add its bias at the end"
    return ""


def project(module: nn.Module, x: Tensor, a_SI: Tensor) -> Tensor:
    """No hidden value for each token."""
    return by_row(x)[..., :0].to(a_SI.dtype)


def inputs(module: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    """The input by row and token."""
    return by_row(x)


def rows(module: nn.Module, y: Tensor) -> Tensor:
    """The output by row and token."""
    return by_row(y)


def put_back(y_BTO: Tensor, y: Tensor) -> Tensor:
    """The values in the shape of y."""
    return y_BTO.reshape(y.shape)
