"""Layer norms: no update of a matrix, but a trained bias (peft's bias="all"), which is what such an adapter has of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loraweave.composer.model.kinds import _kind
from loraweave.composer.model.kinds._kind import Shape, by_row
from loraweave.types import Kind

# of an update without rank rows
name: Kind = "linear"
modules = "torch.nn.LayerNorm"
inputs, rows, put_back = _kind.inputs_by_row, _kind.rows, _kind.put_back


def shape(module: nn.Module) -> Shape | None:
    """(features, 0) of a layer norm over the last axis; None for any other module."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Shape(int(module.normalized_shape[0]), 0)
    return None


def refusal(module: Any) -> str:
    """Not exact is a norm whose forward may do more."""
    if type(module).forward is not nn.LayerNorm.forward:
        return "whose forward is its own, and may do more than add its bias at the end"
    return ""


def project(module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
    """No hidden value for each token."""
    return by_row(x)[..., :0].to(a_SI.dtype)
