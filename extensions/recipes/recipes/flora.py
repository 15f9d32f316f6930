"""FLoRA (Wen and Chaudhuri 2023, arXiv 2312.05677): an adapter for each row of a batch, which may multiply the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraweave.extend.recipes import Site
from loraweave.extensions.recipes.row_gates import TaskRecipe


@dataclass(frozen=True, kw_only=True)
class Flora(TaskRecipe):
    """An expert for each of `tasks`, which a row of that task has: y = (W * (b_e^T a_e)) x + bias, elementwise.

    That is the sum over ranks of b_er * (W (a_er * x)), so that one product with W serves rows of all tasks. The first rank
    begins as ones, which leaves W as it is; the others, which the paper does not specify, begin with a normal and b 0. There
    is no scale and no dropout. `mode` "additive" is y = W x + alpha / rank * b_e^T a_e x, a LoRA for each task.
    """

    mode: Literal["multiplicative", "additive"] = "multiplicative"

    silent_at_first = ("a_SI", "a_ERI")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "multiplicative" and self.alpha is not None:
            self.refuse("alpha", "it takes None where the experts multiply the weight: there is no scale")
        if self.mode == "multiplicative" and self.dropout:
            self.refuse("dropout", "it takes 0 where the experts multiply the weight: there is no input of their own")

    @property
    def form(self) -> str:  # type: ignore[override]
        return "multiplied" if self.mode == "multiplicative" else "sum_of_experts"

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.mode == "additive":
            return super().start(site, expert, rank, generator)
        a_RI, b_RO = torch.randn(rank, site.num_inputs, generator=generator), torch.zeros(rank, site.num_outputs)
        a_RI[0], b_RO[0] = 1, 1
        return a_RI, b_RO
