"""What a kind of layer is: which modules are of it, their size as a matrix (O, I), and where their tokens lie."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loraweave.types import Kind


class Shape(NamedTuple):
    """A layer's weight as a matrix (O, I); `transposed` says that it is stored as (I, O)."""

    num_outputs: int
    num_inputs: int
    transposed: bool = False
    kernel: tuple[int, ...] = ()


class LayerKind(Protocol):
    """A file of this folder, seen as an object.

    For every kind y0 = W x with x_BTI and y_BTO by row and token, whatever the module takes and gives. All but `shape` are
    for modules of the kind. Where features are the last axis, `inputs_by_row`, `rows` and `put_back` below do.
    """

    name: Kind
    modules: str

    def shape(self, module: nn.Module) -> Shape | None:
        """The layer's size; None for a module that is not of this kind."""

    def refusal(self, module: Any) -> str:
        """Why an update of this layer would not be y0 + update, as a phrase; empty where it is."""

    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        """hidden_BTS = x a^T for what the module was called with, in the dtype of a or a wider one."""

    def inputs(self, module: Any, x: Tensor, like: Tensor) -> Tensor:
        """x_BTI itself, with the dtype of `like`: what a router sees."""

    def rows(self, module: Any, y: Tensor) -> Tensor:
        """The module's output as y_BTO, in the same memory."""

    def put_back(self, y_BTO: Tensor, y: Tensor) -> Tensor:
        """Values by row and token in the shape of the module's output y."""


def by_row(tensor: Tensor) -> Tensor:
    """(rows, tokens, features) of a tensor whose last axis are the features and whose first the rows, if it has one."""
    if tensor.ndim == 1:
        return tensor[None, None]
    # not -1, which is ambiguous for a tensor without elements
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])


def inputs_by_row(module: Any, x: Tensor, like: Tensor) -> Tensor:
    """The input by row and token, in its own dtype."""
    return by_row(x)


def rows(module: Any, y: Tensor) -> Tensor:
    """The output by row and token."""
    return by_row(y)


def put_back(y_BTO: Tensor, y: Tensor) -> Tensor:
    """The values in the shape of y."""
    return y_BTO.reshape(y.shape)


def is_near(y: object, expected: Tensor, *, atol: float) -> bool:
    """Whether what a module gave is a tensor of that shape, and within 1 % or `atol` of it."""
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y.float(), expected.float(), 1e-2, atol)
