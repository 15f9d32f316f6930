"""Which axis of a layer's input is the batch: weights by row are given out along the first one."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Size

from loraweave.errors import ScopeError

# rows of the batch that the running call of a model was given, where they are known
_ROWS: ContextVar[int | None] = ContextVar("loraweave_batch_rows", default=None)
# whether it was given images or sounds beside them, of which a row may have any number
_BESIDE: ContextVar[bool] = ContextVar("loraweave_batch_beside", default=False)


def begin_call(num_rows: int | None, *, beside: bool = False) -> None:
    """Remembers the rows of a model's call, in this context, until `end_call`, and whether images or sounds are `beside`."""
    _ROWS.set(num_rows)
    _BESIDE.set(beside)


def end_call() -> None:
    """The call is over, however it ended."""
    # torch.compile sees no context, and looks at no rows
    if not torch.compiler.is_compiling():
        _ROWS.set(None)
        _BESIDE.set(False)


def is_beside() -> bool:
    """Whether layers of the running call may see images or sounds in the place of its rows."""
    return _BESIDE.get()


def can_be_batch(num_rows: int) -> bool:
    """Whether so many rows are those of the model's call, as far as these are known."""
    rows = _ROWS.get()
    return rows is None or num_rows == rows


def require_own_rows(layer: str, num_rows: int) -> None:
    """Raises ScopeError for a layer that meets another number of rows than the call has, which has images or sounds too.

    How many of these belong to each row, only the model knows.
    """
    rows = _ROWS.get()
    if rows is not None and num_rows != rows and _BESIDE.get():
        raise ScopeError(
            f"the weights vary by row or token, but layer {layer!r} has {num_rows} rows in a call of {rows} texts with "
            "images or sounds, and which are whose cannot be told: give one mixture for all rows, or name the other layers "
            "in MixtureWeights(layers=...)"
        )


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
