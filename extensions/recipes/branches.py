"""The branches of tasks that leave a shared stream in the last block of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import ScopeError
from loraweave.extend import Site, numbered_blocks


@dataclass(frozen=True)
class BranchSite(Site):
    """A site that says whether it is `closing`: in the last block of its stage or stack, or outside the blocks."""

    closing: bool = True


@dataclass(eq=False)
class Branch:
    """The tensors that the branches of tasks take over from the shared stream, by path: inputs of blocks, outputs of sites.

    They are noted while the shared stream runs, and taken once the branches have `left` it. While it runs, the blocks where
    branches leave see `num_streams` times its rows: its own, and those of each task where it is made of theirs.
    """

    left: bool = False
    num_streams: int = 1
    noted: dict[str, Tensor] = field(default_factory=dict)

    def note(self, path: str, value: Tensor) -> None:
        """Note a tensor of the shared stream. Raises ScopeError for a place that runs twice in a call."""
        # a layer that a backward pass runs again was noted before
        if torch._C._current_graph_task_id() != -1:
            return
        if path in self.noted:
            raise ScopeError(
                f"{path!r} runs more than once in a call, so that a task's branch has no one place to leave: leave it out "
                "of target_modules"
            )
        self.noted[path] = value

    def take(self, path: str) -> Tensor:
        """Return a copy of the tensor noted there. Raises ScopeError where the shared stream did not run."""
        if path not in self.noted:
            raise ScopeError(f"{path!r} runs for a task, but not in the shared stream: the model has to run the same layers")
        return self.noted[path].clone()

    def enter(self, block: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the arguments for a branching block, or None to keep `args`. Raises ScopeError if there are none."""
        if not args:
            raise ScopeError(
                f"block {block!r} is given its input by name, so that no branch of a task can leave there: take a "
                "recipe without branches"
            )
        if self.left:
            return self.take(block), *args[1:]
        # blocks may add to it in its own memory
        self.note(block, args[0].clone())
        return None if self.num_streams == 1 else (torch.cat([args[0]] * self.num_streams), *args[1:])

    def leave(self, output: Any) -> Any:
        """Return the block's output for the first of the streams; values of a tuple that are not tensors are kept."""
        if self.left or self.num_streams == 1:
            return output
        return tuple(map(self._first, output)) if isinstance(output, tuple) else self._first(output)

    def _first(self, value: Any) -> Any:
        return value[: len(value) // self.num_streams] if isinstance(value, Tensor) else value


def closing_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the last block of each stage, or of each stack of blocks in a model without stages.

    A numbered module is a stage where it has a list of blocks of one class, as those of Swin, SegFormer and ResNet.
    """
    paths: list[str] = []
    stacks: dict[str, str] = {}
    for block in numbered_blocks(model):
        assert block is not None
        module = model.get_submodule(block)
        stages = [(block, module), *((f"{block}.{part}", child) for part, child in module.named_children())]
        lists = [(path, list(stage)) for path, stage in stages if isinstance(stage, nn.ModuleList | nn.Sequential)]
        alike = [(path, modules) for path, modules in lists if len({type(inner) for inner in modules}) == 1]
        paths += [f"{path}.{len(modules) - 1}" for path, modules in alike]
        if not alike:
            stacks[block.rpartition(".")[0]] = block
    return paths or list(stacks.values())
