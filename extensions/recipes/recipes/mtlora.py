"""MTLoRA (Agiza, Neseem and Reda 2024, arXiv 2403.20320): a shared stream, and task branches in closing blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave import ScopeError
from loraweave.extend import Count, Positive, Rate, traits
from loraweave.extend.recipes import ExpertShape, Recipe, Site, numbered_blocks
from loraweave.extensions.recipes.row_gates import TaskSwitch


@dataclass(frozen=True)
class BranchSite(Site):
    """A layer with experts (a site), `closing` if it is in the last block of its stage or stack, or outside the blocks."""

    closing: bool = True


@dataclass(eq=False)
class Branch:
    """Tensors that the branches of tasks take from the shared stream, by path: inputs of blocks and outputs of sites.

    They are noted while the shared stream runs, and taken once the branches have `left` it. Blocks where branches leave run
    with `num_streams` times the shared stream's rows: its own, then, where it sums the tasks' outputs, each task's.
    """

    left: bool = False
    num_streams: int = 1
    noted: dict[str, Tensor] = field(default_factory=dict)

    def note(self, path: str, value: Tensor) -> None:
        """Store a tensor of the shared stream under its module's path. Raises ScopeError for a module that runs twice."""
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
        """Return a copy of the tensor stored for `path`. Raises ScopeError if the shared stream did not run that module."""
        if path not in self.noted:
            raise ScopeError(f"{path!r} runs for a task, but not in the shared stream: the model has to run the same layers")
        return self.noted[path].clone()

    def enter(self, block: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the arguments for a branching block, or None to keep `args`. Raises ScopeError if `args` is empty."""
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
        """Return the block's output for the shared stream, the first of the streams; non-tensors in a tuple are kept."""
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


@traits("images")
@dataclass(frozen=True, kw_only=True)
class Mtlora(Recipe):
    """A shared stream y = W x + s B A x, from which a branch of each task leaves in the last block of each stage.

    The branch has experts of its own at `task_modules`: y_t = W x + s_t B_t A_t x_t, with x of the shared stream, which goes
    on to the next stage, and x_t of the branch, which goes to the task's output.

    `mode` "matrix" is that; with "matrixv2" the branch has s B A x, too. With "addition" the shared stream has
    W x + LayerNorm(sum over t of y_t) at these places, inside blocks. The LayerNorm's factor begins as 0, so that it begins
    as the base, and as 1 with `as_released`, as in the released code.

    `rank` and `shared_scale` s are of the shared experts; `task_rank` and `task_scale` s_t of the tasks', one for all or one
    for each, as published for Swin-T. There is no alpha / rank. `trainable_scales` lets the scales learn. Dropout is before
    every update; the released code has none before those of a branch whose x_t is its own.

    The published model gives the outputs of all tasks for an image; here a row has one task, and an image that is asked for
    several is several rows. A site outside the blocks belongs to the branch.
    """

    rank: Count = 32
    task_rank: Count | tuple[Count, ...] = 4
    mode: Literal["matrix", "matrixv2", "addition"] = "matrix"
    shared_scale: Positive = 4.0
    task_scale: Positive | tuple[Positive, ...] = 4.0
    trainable_scales: bool = False
    dropout: Rate = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    task_modules: tuple[str, ...] = ("o_proj", "fc1", "fc2")
    as_released: bool = False

    form: ClassVar[str] = "task_branches"
    needs_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self.refuse("alpha", "it takes None: the scales are shared_scale and task_scale")
        self._for_tasks("task_rank")
        self._for_tasks("task_scale")
        if not any(
            _ends(target, ending) or _ends(ending, target) for target in self.target_modules for ending in self.task_modules
        ):
            self.refuse("task_modules", f"name endings of layers that are among target_modules, {self.target_modules}")

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def num_streams(self) -> int:
        return len(self.tasks) + 1 if self.mode == "addition" else 1

    def shape(self, site: Site) -> ExpertShape:
        shared = (self.rank,) * self._num_shared(site)
        return ExpertShape(shared + (self._for_tasks("task_rank") if self.is_branched(site) else ()))

    def roles(self, site: Site, shape: ExpertShape) -> tuple[Hashable, ...]:
        num_shared = self._num_shared(site)
        return (*(("shared", place) for place in range(num_shared)), *self.tasks[: shape.num_experts - num_shared])

    def gate(self, site: Site, num_experts: int) -> TaskSwitch:
        num_shared = self._num_shared(site)
        scales = [self.shared_scale] * num_shared + list(self._for_tasks("task_scale"))[: num_experts - num_shared]
        without_task = [expert < num_shared or not num_shared for expert in range(num_experts)]
        if not self.is_branched(site):
            used = [without_task] * (len(self.tasks) + 1)
        else:
            used = [[expert == num_shared + task for expert in range(num_experts)] for task in range(len(self.tasks))]
            used.append(without_task)
        return TaskSwitch(used, scales, learned=self.trainable_scales)

    def _num_shared(self, site: Site) -> int:
        return 0 if self.mode == "addition" and self.is_branched(site) else 1

    def is_branched(self, site: Site) -> bool:
        """Return True if the tasks have experts of their own at a site."""
        if not self.tasks:
            self.refuse("tasks", "name those that get experts of their own")
        closing = not isinstance(site, BranchSite) or site.closing
        branched = closing and any(_ends(site.name, ending) for ending in self.task_modules)
        if branched and self.mode == "addition" and site.block is None:
            self.refuse(
                "mode", f"{site.name!r} is outside the blocks, where tasks have no streams: leave it out, or take 'matrix'"
            )
        return branched

    def _for_tasks(self, option: str) -> tuple[Any, ...]:
        """Return the values of the option of this name, one for each task; one value counts for all tasks."""
        value = getattr(self, option)
        values = value if isinstance(value, tuple) else (value,) * max(len(self.tasks), 1)
        if self.tasks and len(values) != len(self.tasks):
            self.refuse(option, f"it takes one for all, or one for each of the {len(self.tasks)} tasks {self.tasks}")
        return values


def _ends(path: str, ending: str) -> bool:
    return f".{path}".endswith(f".{ending}")
