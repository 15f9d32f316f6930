"""Which axis of a layer's input is the batch: weights by row are given out along the first one."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Size

from loraweave.errors import ScopeError

# rows of the batch that the running call of a model was given, where they are known
_ROWS: ContextVar[int | None] = ContextVar("loraweave_batch_rows", default=None)


def begin_call(num_rows: int | None) -> None:
    """Remembers the rows of a model's call, in this context, until `end_call`."""
    _ROWS.set(num_rows)


def end_call() -> None:
    """The call is over, however it ended."""
    # torch.compile sees no context, and looks at no rows
    if not torch.compiler.is_compiling():
        _ROWS.set(None)


def can_be_batch(num_rows: int) -> bool:
    """Whether so many rows are those of the model's call, as far as these are known."""
    rows = _ROWS.get()
    return rows is None or num_rows == rows


def require_batch_first(layer: str, shape: Size) -> None:
    """Raises ScopeError for (A, B, features) where B and not A is the rows of the model's call.

    XLNet, FSMT and Longformer's attention put the tokens first. Where as many tokens as rows are, nothing can be told.
    """
    rows = _ROWS.get()
    if rows is not None and len(shape) == 3 and shape[0] != rows and shape[1] == rows:
        raise ScopeError(
            f"the weights vary by row or token, but the input of layer {layer!r} is {tuple(shape)}, whose second axis and "
            f"not the first is the batch's {rows} rows: give one mixture for all rows"
        )
