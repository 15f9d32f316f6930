"""What recipes share in which each task has a LoRA of its own, and a row that of its task."""

from __future__ import annotations

from dataclasses import dataclass

from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.recipes._token_gates import TaskSwitch


@dataclass(frozen=True, kw_only=True)
class OwnExpert(Recipe):
    """y = y0 + alpha / rank * B_e A_e dropout(x), e the expert of the row's task."""

    needs_tasks = True

    def shape(self, site: Site) -> ExpertShape:
        # until fit() knows the tasks there is one expert
        return ExpertShape((self.rank,) * max(len(self.tasks), 1))

    def gate(self, site: Site, num_experts: int) -> TaskSwitch:
        own = [[expert == task for expert in range(num_experts)] for task in range(num_experts)]
        return TaskSwitch([*own, [False] * num_experts], [1.0] * num_experts)
