"""The checks of a call of the model before any layer runs: a mistake is named while no cache has taken anything yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from loraweave.composer.live.call_router import CallRouter, arguments_of
from loraweave.composer.live.kernels._choice import ONLY, block_of
from loraweave.composer.live.limits import CALL, Call
from loraweave.composer.live.standing_in import Hook
from loraweave.errors import CompositionError, ScopeError

# arguments of transformers' models whose first axis are the rows of the batch
MAIN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")

# inputs, some of them above, of which one row of text may have several
BESIDE_TEXT = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values"})

# what only transformers' continuous batching gives a model
PAGED_INPUTS = frozenset({"cu_seq_lens_q", "write_index"})


class Entry(Hook):
    """The hook that runs before the model's forward.

    `require_unchanged` raises where the model has other layers than it had, or other weights than these experts were made
    for; `current` returns the activation that counts, if any, which has a `plan`.
    `begin` shows the call's arguments to a router that looks at all of them first.
    """

    def __init__(
        self,
        model: nn.Module,
        require_unchanged: Callable[[Iterable[str]], None],
        current: Callable[[], Any],
        begin: Callable[[CallRouter, dict[str, Any]], None],
    ) -> None:
        self._model = ref(model)
        self._require_unchanged = require_unchanged
        self._current = current
        self._begin = begin

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # each layer looks at its rows when the code runs
            return
        if module is not self._model():
            raise CompositionError(
                f"a replica of the model ({type(module).__name__}) runs (DataParallel), whose threads have no mixture; "
                "use one process per device, each with its own Composer"
            )
        if kwargs.keys() >= PAGED_INPUTS:
            raise CompositionError(
                "continuous batching packs requests into one row and runs the model in a thread that has no mixture: leave "
                "the activation first and use fused(), or generate() with a mixture per text"
            )
        activation = self._current()
        if activation is not None:
            plan = activation.plan
            self._require_unchanged(plan.experts)
            if plan.only != (only := ONLY.get()):
                raise ScopeError(
                    f"{block_of(only or plan.only or '')} counts for activations that are opened inside it, with a weight "
                    "for each row: open this one there; routers, activated LoRAs, and weights that vary by token or learn, "
                    "are for other calls"
                )
            call_input = _main_input(args, kwargs)
            plan.begin_call(call_input)
            if plan.call_router is not None:
                self._begin(plan.call_router, arguments_of(module, args, kwargs))
            num_rows = None
            # features by (row * token) do not say how many rows they are
            if call_input is not None and not (call_input.ndim == 2 and call_input.is_floating_point()):
                num_rows = call_input.shape[0]
            beside = BESIDE_TEXT & kwargs.keys()
            has_more = bool(beside) and any(kwargs[name] is not None and kwargs[name] is not call_input for name in beside)
            CALL.set(Call(num_rows, has_more))


class Exit(Hook):
    """The hook that runs after the model's forward."""

    def __init__(self, end: Callable[[Any], None]) -> None:
        self._end = end

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._end(output)


def _main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor whose first axis is the rows of a batch, or None where a model's arguments do not tell."""
    known = args[:1] or [kwargs[name] for name in MAIN_INPUTS if kwargs.get(name) is not None]
    return known[0] if known and isinstance(known[0], Tensor) and known[0].ndim > 1 else None
