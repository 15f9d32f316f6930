"""What an expert model puts into its base: hooks that do nothing in the calls of others.

A copy or a pickle of the expert model has hooks of its own, which know the copy; a copy of the base alone has none that act.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import Token
from dataclasses import replace
from typing import Any

from torch import nn

from loraweave.composer.experts.running import RUNNING, Running
from loraweave.composer.train.checkpointed_blocks import Contexts
from loraweave.errors import TrainingError


class Hook:
    """Does `act`, a method of the expert model, when a module runs in a call of that model; `place` are its first arguments.

    `act` returns what torch takes from a hook of its kind. The copy of a base alone has a hook without an `owner`.
    """

    def __init__(self, owner: Any, act: Callable[..., Any], *place: Any) -> None:
        self.owner = owner
        self._act = act
        self._place = place

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        running = RUNNING.get()
        if running is None or running.owner is not self.owner:
            return None
        return self._act(self.owner, running, *self._place, module, *given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(memo.get(id(self.owner)), self._act, *self._place)


def require_same_call(model: nn.Module) -> None:
    """Raises TrainingError for a model whose checkpointed blocks would run again without the call and its experts."""
    for module in model.modules():
        again = getattr(module, "_gradient_checkpointing_func", None)
        is_ours = getattr(again, "keywords", {}).get("context_fn") is same_call
        if getattr(module, "gradient_checkpointing", False) and not is_ours:
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
