"""MTLoRA (Agiza, Neseem and Reda 2024, arXiv 2403.20320): a shared stream, and a branch for each task in closing blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from loraweave.extend import Count, ExpertShape, Positive, Rate, Recipe, Site, traits
from loraweave.extensions.recipes.branches import BranchSite
from loraweave.extensions.recipes.row_gates import TaskSwitch


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
    several is several rows. A place outside the blocks is of the branch.
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
        """Return whether the tasks have experts of their own at a site."""
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
        """Return an option's value for each task."""
        value = getattr(self, option)
        values = value if isinstance(value, tuple) else (value,) * max(len(self.tasks), 1)
        if self.tasks and len(values) != len(self.tasks):
            self.refuse(option, f"it takes one for all, or one for each of the {len(self.tasks)} tasks {self.tasks}")
        return values


def _ends(path: str, ending: str) -> bool:
    return f".{path}".endswith(f".{ending}")
