"""Low-rank updates of several jobs added to their own rows of a layer's output, as one step of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RowRange(NamedTuple):
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
        for (start, stop, scale), a_RI, b_OR in zip(ranges, factors[::2], factors[1::2], strict=True):
            hidden_MR = (x_NI[start:stop] @ a_RI.to(x.dtype).T).mul_(scale)
            # below autocast y may be of another dtype than x
            y_NO[start:stop].addmm_(hidden_MR.to(y.dtype), b_OR.to(x.dtype).to(y.dtype).T)
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
        for index, (start, stop, scale) in enumerate(ranges):
            a_RI, b_OR = factors[2 * index : 2 * index + 2]
            grad_MO = grad_NO[start:stop]
            mixed_MR = (grad_MO @ b_OR.to(x.dtype)).mul_(scale)
            if grad_x_NI is not None:
                torch.mm(mixed_MR, a_RI.to(x.dtype), out=grad_x_NI[start:stop])
            # the narrow operand is the one that is transposed: a wide one would be copied in bf16
            found.append((mixed_MR.T @ x_NI[start:stop]).to(a_RI.dtype) if needed[3 + 2 * index] else None)
            found.append((hidden[index].T @ grad_MO).T.to(b_OR.dtype) if needed[4 + 2 * index] else None)
        return grad if needed[0] else None, None if grad_x_NI is None else grad_x_NI.view_as(x), None, *found
