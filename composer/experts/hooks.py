"""What an expert model puts into its base: hooks that do nothing in the calls of others.

A copy or a pickle of the expert model has hooks of its own, which know the copy; a copy of the base alone has none that act.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from contextvars import Token
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from loraweave.composer.experts.running import RUNNING, Running
from loraweave.composer.train.checkpointed_blocks import Contexts
from loraweave.errors import ScopeError, TrainingError
from loraweave.routers.recipes._gate import Call


class Owner(Protocol):
    """The expert model whose hooks these are."""

    def show_gates(self, call: Call) -> None: ...
    def with_experts(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor, call: Call) -> Tensor: ...
    def before_part(self, name: str, part: int, args: tuple[Any, ...], running: Running) -> tuple[Any, ...]: ...
    def after_part(self, name: str, part: int, args: tuple[Any, ...], y: Tensor, running: Running) -> Tensor: ...


class _Hook:
    """A hook of one expert model; `owner` is None in a copy of the base alone."""

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner

    @property
    def running(self) -> Running | None:
        """The call of the owner that runs, if one does."""
        running = RUNNING.get()
        return running if running is not None and running.owner is self.owner else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self), owner=memo.get(id(self.owner)))
        return copied


class BeforeCall(_Hook):
    """Before the base's forward: tells the gates what the call is."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (running := self.running) is not None:
            assert self.owner is not None
            running.begin(module, args, kwargs)
            self.owner.show_gates(running.call)


class AfterSite(_Hook):
    """After a site's forward: its output with its experts."""

    def __init__(self, owner: Owner, site: str) -> None:
        super().__init__(owner)
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if (running := self.running) is None:
            return y
        assert self.owner is not None
        return self.owner.with_experts(self.site, module, args, y, running.call)


class BeforeBranch(_Hook):
    """Before the block where branches leave the shared stream: its input is the shared stream's."""

    def __init__(self, owner: Owner, block: str) -> None:
        super().__init__(owner)
        self.block = block

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        running = self.running
        if running is None or running.branch is None:
            return None
        if not args:
            raise ScopeError(
                f"block {self.block!r} is given its input by name, so that no branch of a task can leave there: take a "
                "recipe without branches"
            )
        if running.branch.left:
            return running.branch.take(self.block), *args[1:]
        # blocks may add to it in its own memory
        running.branch.note(self.block, args[0].clone())
        num_streams = running.branch.num_streams
        return None if num_streams == 1 else (torch.cat([args[0]] * num_streams), *args[1:])


class AfterBranch(_Hook):
    """After the block where branches leave the shared stream: its output alone goes on, while it runs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = self.running
        if running is None or running.branch is None or running.branch.left or running.branch.num_streams == 1:
            return output
        share = running.branch.num_streams
        return (
            tuple(_first_rows(each, share) for each in output) if isinstance(output, tuple) else _first_rows(output, share)
        )


class BeforePart(_Hook):
    """Before the forward of a layer within a site: its input with the experts of the site."""

    def __init__(self, owner: Owner, site: str, part: int) -> None:
        super().__init__(owner)
        self.site = site
        self.part = part

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (running := self.running) is None:
            return None
        assert self.owner is not None
        return self.owner.before_part(self.site, self.part, args, running)


class AfterPart(BeforePart):
    """After the forward of a layer within a site: its output with the experts of the site."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:  # type: ignore[override]
        if (running := self.running) is None:
            return y
        assert self.owner is not None
        return self.owner.after_part(self.site, self.part, args, y, running)


def _first_rows(output: Any, share: int) -> Any:
    """The first of `share` equal parts of the rows; a value that is no tensor stays as it is."""
    return output[: len(output) // share] if isinstance(output, Tensor) else output


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
