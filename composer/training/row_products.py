"""Low-rank updates of several jobs added to their own rows of a layer's output, as one step of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class RowRange:
    """Flat tokens `start` to `stop` (without it), whose update has this scale."""

    start: int
    stop: int
    scale: float


def add_products(y: Tensor, x: Tensor, ranges: Sequence[RowRange], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """y with s (x a^T) b^T added at each range, (a_RI, b_OR) being its factors; gradients reach y, x and the factors.

    Products run in the dtype of x. The result may be in y's own memory, so nothing else may need y's values; ranges are in
    ascending order and do not overlap.
    """
    # in a view autograd would keep track of the whole, at the cost of copies
    own = (
        y.clone(memory_format=torch.contiguous_format)
        if y._is_view() or not y.is_contiguous() or (y.is_leaf and y.requires_grad)
        else y
    )
    found: Tensor = _RowProducts.apply(own, x, tuple(ranges), *(tensor for pair in factors for tensor in pair))  # type: ignore[no-untyped-call]
    return found


def naive_products(y: Tensor, x: Tensor, ranges: Sequence[RowRange], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What `add_products` gives, product by product."""
    x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    parts, end = [], 0
    for part, (a_RI, b_OR) in zip(ranges, factors, strict=True):
        x_MI = x_NI[part.start : part.stop]
        hidden_MR = functional.linear(x_MI, a_RI.to(x.dtype))
        update_MO = functional.linear(hidden_MR, part.scale * b_OR.to(x.dtype))
        parts += [y_NO[end : part.start], y_NO[part.start : part.stop] + update_MO.to(y.dtype)]
        end = part.stop
    return torch.cat([*parts, y_NO[end:]]).view_as(y)


class _RowProducts(torch.autograd.Function):
    """Keeps x, the factors and the hidden values; twice differentiated, it raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, ranges: tuple[RowRange, ...], *factors: Tensor) -> Tensor:
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        hidden = []
        for part, a_RI, b_OR in zip(ranges, factors[::2], factors[1::2], strict=True):
            hidden_MR = x_NI[part.start : part.stop] @ a_RI.to(x.dtype).T
            # below autocast y may be of another dtype than x
            y_NO[part.start : part.stop].addmm_(hidden_MR.to(y.dtype), b_OR.to(x.dtype).to(y.dtype).T, alpha=part.scale)
            hidden.append(hidden_MR)
        ctx.mark_dirty(y)
        ctx.ranges = ranges
        ctx.save_for_backward(x, *factors, *hidden)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        ranges, needed = ctx.ranges, ctx.needs_input_grad
        factors, hidden = kept[: 2 * len(ranges)], kept[2 * len(ranges) :]
        x_NI, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        whole = sum(part.stop - part.start for part in ranges) == len(x_NI)
        grad_x_NI = (torch.empty_like if whole else torch.zeros_like)(x_NI) if needed[1] else None
        found: list[Tensor | None] = []
        for index, part in enumerate(ranges):
            rows, (a_RI, b_OR) = slice(part.start, part.stop), factors[2 * index : 2 * index + 2]
            mixed_MR = (grad_NO[rows] @ b_OR.to(x.dtype)).mul_(part.scale)
            if grad_x_NI is not None:
                torch.mm(mixed_MR, a_RI.to(x.dtype), out=grad_x_NI[rows])
            # the narrow operand is the one that is transposed: a transposed wide one is copied in bf16
            found.append((mixed_MR.T @ x_NI[rows]).to(a_RI.dtype) if needed[3 + 2 * index] else None)
            grad_b = (hidden[index].T @ grad_NO[rows]).T.to(b_OR.dtype).mul_(part.scale) if needed[4 + 2 * index] else None
            found.append(grad_b)
        return grad if needed[0] else None, None if grad_x_NI is None else grad_x_NI.view_as(x), None, *found
