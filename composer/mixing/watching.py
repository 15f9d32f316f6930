"""Blocks of a model whose input routers look at, from the first activation that asks for it until the last one ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.mixing.standing_in import StandIn, give_back
from loraweave.routers.routing.blocks import BlockInput, running

# how transformers calls what runs a block without keeping what is inside it
CHECKPOINT = "_gradient_checkpointing_func"


class WatchedBlock(StandIn):
    """Stands in for a block's `forward`: says what the block is given, also when gradient checkpointing runs it again."""

    def __init__(self, path: str, block: nn.Module) -> None:
        self.path = path
        self._block = block
        self._tells = True
        self._own = {name: vars(block).get(name) for name in ("forward", CHECKPOINT)}
        self._forward = block.forward
        block.forward = self.run  # type: ignore[method-assign]
        if self._own[CHECKPOINT] is not None:
            vars(block)[CHECKPOINT] = self.checkpoint

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        with self._running(args, kwargs):
            return self._forward(*args, **kwargs)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """The block's checkpointing, which calls the function now and in the backward pass."""
        own: Any = self._own[CHECKPOINT]
        return own(partial(self._again, function), *args)

    def _again(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._running(args, getattr(function, "keywords", {})):
            return function(*args)

    def _running(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        x_BTI = kwargs.get("hidden_states", given[0] if given else None)
        # in code made by torch.compile layers find no input, and say so
        if not self._tells or torch.compiler.is_compiling() or not isinstance(x_BTI, Tensor) or x_BTI.ndim != 3:
            return nullcontext()
        beside = frozenset(each.data_ptr() for each in given if each is not x_BTI)
        return running(BlockInput(self.path, x_BTI, beside))

    def own(self, name: str) -> Any:
        return self._own[name]

    def remove(self) -> None:
        """Gives the block back what it had. Where another stands in for this one by now, that stays, and calls this."""
        self._tells = False
        for name, own in self._own.items():
            give_back(self._block, name, own, self)
