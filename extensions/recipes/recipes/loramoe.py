"""LoRAMoE (Dou et al. 2023, arXiv 2312.09979): one half of the experts for world knowledge, the other for other tasks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave import ScopeError, UnknownName
from loraweave.extend import Count, NonNegative, Positive, Rate, nearest
from loraweave.extend.recipes import FEED_FORWARD, EvenRecipe, Site, TokenGate
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.losses.localised import localised


@dataclass(frozen=True, kw_only=True)
class Loramoe(EvenRecipe):
    """A mixture with w = softmax(r x) over all experts, for each token and site of the feed-forward layers.

    `balance` times the sum over sites of the loss `localised` is added: rows of the tasks that `knowledge` names shall use
    the first half of the experts more than the second, the others the second, (1 + `delta`) / (1 - `delta`) times as much
    where the loss is least. Without `knowledge` all experts shall be used alike (`delta` 0). Tasks of rows are looked at in
    training alone.

    Sizes are those of the released code, whose script leaves the constraint out, as `as_released` does. The code sums over
    padding, too; here, only real tokens count, and a row counts as much as another of any length.
    """

    rank: Count = 4
    alpha: Positive | None = 32.0
    dropout: Rate = 0.05
    target_modules: tuple[str, ...] = FEED_FORWARD
    balance: NonNegative = 0.1
    delta: Rate = 0.1
    knowledge: tuple[str, ...] = ()
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts % 2:
            self.refuse("num_experts", "it takes an even number, half for knowledge and half for other tasks")
        # fit() may get the tasks from its data, and then sets them
        for task in self.knowledge if self.tasks else ():
            if task not in self.tasks:
                close = nearest(task, self.tasks)
                known = ", ".join(map(repr, self.tasks))
                raise UnknownName(f"knowledge of recipe {self.name!r} names {task!r}{close}; its tasks are {known}")

    @property
    def heeds_tasks(self) -> bool:  # type: ignore[override]
        return bool(self.knowledge)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return the balance term. Raises ScopeError for rows without a task, where `knowledge` tells tasks apart."""
        if self.as_released or not self.balance:
            return {}
        first_B, delta = self._knows(step), self.delta if self.knowledge else 0.0
        by_site = [localised(step.row_means(w_BTE), first_B, delta) for w_BTE in step.weights.values()]
        return {"balance": self.balance * torch.stack(by_site).sum()}

    def _knows(self, step: Step) -> Tensor:
        """Return first_B, True for each row of a `knowledge` task. Raises ScopeError for rows without a task."""
        num_rows, missing = len(step.expert_B), int((step.expert_B < 0).sum())
        if self.knowledge and missing:
            raise ScopeError(
                f"recipe {self.name!r} balances its experts by tasks, and {missing} of {num_rows} rows have none: give "
                "task=... for each, or knowledge=() to balance all experts alike"
            )
        ids = [place for place, task in enumerate(self.tasks) if task in self.knowledge]
        return torch.isin(step.expert_B, torch.tensor(ids, dtype=torch.long, device=step.expert_B.device))
