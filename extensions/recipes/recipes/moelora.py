"""MOELoRA (Liu et al. 2023, arXiv 2310.18339): small experts whose weights depend on the task of the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraweave import ScopeError
from loraweave.extend import Count
from loraweave.extend.recipes import Call, ExpertShape, Gate, Recipe, Site, Weighing, draw_linear

# as in the released code; the paper gives no standard deviation
STD_OF_A = 0.01


@dataclass(frozen=True, kw_only=True)
class Moelora(Recipe):
    """A mixture with w = softmax(g e_task), with an embedding of `num_features` numbers for each of `tasks`.

    y = y0 + alpha / rank * sum over e of w_e B_e A_e x, where the experts have `rank` / `num_experts` each and the scale is
    that of the whole rank, as published. `shared` is one gate for all sites instead of one for each. a begins normal with a
    standard deviation of 0.01. Every row has to have a task, and `adapter(task)` is the model of that task.

    The released code has 4 experts by default and the paper 8; its further embedding, which belongs to no task, is left out.
    """

    rank: Count = 16
    num_experts: Count = 8
    num_features: Count = 64
    shared: bool = False

    needs_tasks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.num_experts:
            self.refuse("rank", f"the {self.num_experts} experts of num_experts share it evenly: take a multiple of that")

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank // self.num_experts,) * self.num_experts)

    def gate_key(self, site: Site) -> str:
        return "all" if self.shared else site.name

    def gate(self, site: Site, num_experts: int) -> TaskGate:
        return TaskGate(len(self.tasks), self.num_features, num_experts)

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a from the normal distribution, with b zero."""
        a_RI = STD_OF_A * torch.randn(rank, site.num_inputs, generator=generator)
        return a_RI, torch.zeros(rank, site.num_outputs)


class TaskGate(Gate):
    """A gate with w = softmax(g e_task), with an embedding e_KD of each of K tasks and g_ED; in fp32 or better."""

    static = True

    def __init__(self, num_tasks: int, num_features: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.e_KD = nn.Parameter(torch.empty(num_tasks, num_features))
        self.g_ED = nn.Parameter(torch.empty(num_experts, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw e_KD from the normal distribution, g_ED uniformly between -1/sqrt(D) and 1/sqrt(D), as torch does."""
        self.e_KD.normal_(generator=generator)
        draw_linear(self.g_ED, generator)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        """Return the weights of each row's task. Raises ScopeError for a call without tasks."""
        if call.task_B is None:
            raise ScopeError(
                "the gate looks at the task of each row, and this call has none: give task=..., one for each row"
            )
        scores_B1E = (self.e_KD[call.task_B] @ self.g_ED.T)[:, None]
        return Weighing(scores_B1E.softmax(dim=-1), scores_B1E)
