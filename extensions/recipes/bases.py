"""Base classes of recipes with an expert for each task, or with experts that do not learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraweave.extend import ExpertShape, Recipe, Site
from loraweave.extensions.recipes.row_gates import TaskSwitch


@dataclass(frozen=True, kw_only=True)
class TaskRecipe(Recipe):
    """A recipe with one LoRA for each task: y = y0 + alpha / rank * B_e A_e dropout(x), e the expert of the row's task."""

    needs_tasks = True

    def shape(self, site: Site) -> ExpertShape:
        # until fit() knows the tasks there is one expert
        return ExpertShape((self.rank,) * max(len(self.tasks), 1))

    def gate(self, site: Site, num_experts: int) -> TaskSwitch:
        one_hot = [[expert == task for expert in range(num_experts)] for task in range(num_experts)]
        return TaskSwitch([*one_hot, [False] * num_experts], [1.0] * num_experts)


@dataclass(frozen=True, kw_only=True)
class Frozen(Recipe):
    """A recipe with experts that do not learn."""

    form: ClassVar[str] = "partly_frozen"

    @property
    def frozen(self) -> tuple[int, ...]:
        """The places of the experts that do not learn."""
        raise NotImplementedError
