"""Polytropon's routing in PEFT (Ponti et al. 2022, arXiv 2202.13914): one task's adapter, whatever the input."""

import torch
from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend import unknown_expert
from loraweave.extend.routing import Members, TokenRouter, without


class Poly(TokenRouter):
    """A router with w = 1 for the expert called `task`, 0 for all others, in every row: PEFT's `task_ids` of one task.

    `lw.router(folder)` of a POLY that PEFT saved has an expert for each task, "task_0" and so on, and the first by name is
    the default. Rows of several tasks are a list of mixtures: [{"task_2": 1.0}, {"task_0": 1.0}]. Raises UnknownExpert.
    """

    simplex: bool = False

    def __init__(self, pool: ExpertPool | Members, *, task: str | None = None) -> None:
        super().__init__(pool)
        self.task = min(self.experts) if task is None else task
        if self.task not in self.experts:
            raise unknown_expert(self.task, self.experts)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_11E, the same weights for all inputs."""
        w_11E = torch.zeros(1, 1, len(self.experts), device=x_BTI.device)
        w_11E[..., self.members.places[self.task]] = 1.0
        return without(w_11E, self.members.layers[layer].experts, filling=0.0)
