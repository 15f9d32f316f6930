"""Blocks that run a second time in the backward pass, and still see the call of their first run."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from contextvars import Token
from dataclasses import replace

from torch import nn

from loraweave.composer.experts.running import RUNNING, Running
from loraweave.composer.router_training.checkpointed_blocks import Contexts
from loraweave.errors import TrainingError


def require_same_call(model: nn.Module) -> None:
    """Raises TrainingError for a model whose checkpointed blocks would run again without the call and its experts."""
    for module in model.modules():
        again = getattr(module, "_gradient_checkpointing_func", None)
        if (
            getattr(module, "gradient_checkpointing", False)
            and getattr(again, "keywords", {}).get("context_fn") is not same_call
        ):
            raise TrainingError(
                "the base's gradient checkpointing runs blocks again without their experts: turn it on with the expert "
                "model's own gradient_checkpointing_enable(), or by fit(gradient_checkpointing=True)"
            )


class Again:
    """While it is entered, the running call is the one that was running when this was made, as it was then.

    What a gate decides inside a block is decided again in the second run; what was decided before is there.
    """

    def __init__(self, running: Running | None) -> None:
        self._running = None if running is None else _as_now(running)
        self._tokens: list[Token[Running | None]] = []

    def __enter__(self) -> None:
        # a second run may itself be repeated
        self._tokens.append(RUNNING.set(None if self._running is None else _as_now(self._running)))

    def __exit__(self, *_: object) -> None:
        RUNNING.reset(self._tokens.pop())


def same_call() -> Contexts:
    """For `context_fn` of `torch.utils.checkpoint`: the second run of a block has the call of the first."""
    return nullcontext(), Again(RUNNING.get())


def _as_now(running: Running) -> Running:
    within = {name: dict(seen) for name, seen in running.within.items()}
    call = replace(running.call, kept=dict(running.call.kept), runs=Counter(running.call.runs))
    return replace(running, call=call, within=within)
