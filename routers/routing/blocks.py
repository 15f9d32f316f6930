"""Blocks of a model: what its layers lie in, and what the running block was given."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from loraweave.errors import ScopeError
from loraweave.routers.routing.holding import holding


def block_of(layer: str) -> str | None:
    """The path of the block that a layer lies in: up to the first number. None for a layer outside blocks."""
    found = re.match(r"(.*?(?:^|\.)\d+)\.", layer)
    return found[1] if found else None


@dataclass(frozen=True, eq=False)
class BlockInput:
    """The hidden states that a running block was given, and what routers keep of them until it has run.

    `beside` are the addresses of other tensors that it was given, such as an encoder's states.
    """

    block: str
    x_BTI: Tensor
    beside: frozenset[int]
    kept: WeakKeyDictionary[object, Any] = field(default_factory=WeakKeyDictionary)


# of the running call, in each thread; autograd's own has it while it runs a block again
_RUNNING: ContextVar[BlockInput | None] = ContextVar("loraweave_block_input", default=None)


def running(given: BlockInput) -> AbstractContextManager[None]:
    """The block runs inside."""
    return holding(_RUNNING, given)


def running_block(router: str, layer: str, x_BTI: Tensor) -> BlockInput:
    """What the layer's block was given.

    Raises ScopeError outside a call of the block, and for a layer whose input x_BTI is not of the block's tokens.
    """
    found, block = _RUNNING.get(), block_of(layer)
    if found is None or found.block != block:
        raise ScopeError(
            f"router {router!r} looks at the input of {block!r}, but layer {layer!r} ran in no call of it: call the model "
            "itself rather than a part of it, and not one that torch.compile made"
        )
    if x_BTI.shape[:2] != found.x_BTI.shape[:2] or x_BTI.data_ptr() in found.beside:
        raise ScopeError(
            f"router {router!r} weighs the {tuple(found.x_BTI.shape[:2])} rows and tokens of {block!r}, but layer {layer!r} "
            f"sees {tuple(x_BTI.shape[:2])} others: an encoder's, those of one expert of several, or some rows alone. Leave "
            "the layer out of the adapters, or take a router that looks at the layer's own input"
        )
    return found
