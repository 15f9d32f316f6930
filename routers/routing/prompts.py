"""What the rows of the running calls begin with, where somebody knows it: a call alone does not tell prompt from answer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

from torch import Tensor

from loraweave.errors import ScopeError
from loraweave.routers.routing.holding import holding


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids of the prompts of a batch; the mask is 0 where a token is padding, or follows the prompt.

    `weights` is what routers made of them.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    weights: WeakKeyDictionary[object, Tensor] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def rows(self) -> list[list[int]]:
        """The real tokens of each prompt."""
        return real_tokens(self.ids_BT, self.mask_BT)


_PROMPTS: ContextVar[Prompts | None] = ContextVar("loraweave_prompts", default=None)


def prompted(ids_BT: Tensor, mask_BT: Tensor) -> AbstractContextManager[None]:
    """Says, for the calls inside, what their rows begin with.

    A batch of k times as many rows has each prompt k times on end. What a block around this one has said stays.
    """
    return holding(_PROMPTS, _PROMPTS.get() or Prompts(ids_BT, mask_BT))


def unprompted() -> AbstractContextManager[None]:
    """The calls inside are of other rows than those that a block around this one has said something of."""
    return holding(_PROMPTS, None)


def current_prompts() -> Prompts | None:
    """Those of the running calls, where they are known."""
    return _PROMPTS.get()


def copies_of(router: str, prompts: Prompts, num_rows: int) -> int:
    """How many rows of a call each prompt has, on end. Raises ScopeError where that does not come out even."""
    if not num_rows or num_rows % len(prompts.rows):
        raise ScopeError(
            f"router {router!r} knows {len(prompts.rows)} prompts, but the call has {num_rows} rows, no multiple: call the "
            "model with the rows of the prompts"
        )
    return num_rows // len(prompts.rows)


def real_tokens(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    """The ids of each row whose mask is not 0."""
    pairs = zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in pairs]
