"""FlyLoRA (Zou et al. 2025, arXiv 2510.08396): a frozen sparse random A, whose largest outputs select a token's ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.extend import Count, NonNegative, Share
from loraweave.extend.recipes import Call, ExpertShape, Recipe, Site, Weighing
from loraweave.extensions.recipes.limited_gate import BiasedGate


@dataclass(frozen=True, kw_only=True)
class Flylora(Recipe):
    """The update y = y0 + alpha / rank * B diag(w) A x, with w 1 for the `top_k` ranks of the largest |A x + d|, else 0.

    A is frozen: each of its `rank` rows has `density` of its numbers from N(0, 1 / rank^2), at places drawn at random, and 0
    elsewhere, so that it is router and projection in one, and B alone learns. None is a density of top_k / rank. The bias d
    of a site begins as 0, enters the choice alone, and moves by `bias_rate` after each step of `fit`, up for the ranks that
    fewer real tokens than the mean chose, down for the others. Sizes and defaults are the published ones.

    `by` "value" chooses by A x + d without the absolute value, which the authors' PEFT code does and their paper and plain
    code do not. That code also moves d in every pass, in evaluation, too. With dropout, which they do not use, the choice is
    that of x itself.
    """

    rank: Count = 32
    top_k: Count = 8
    density: Share | None = None
    bias_rate: NonNegative = 0.001
    by: Literal["magnitude", "value"] = "magnitude"

    form: ClassVar[str] = "frozen_projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.rank)

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((1,) * self.rank)

    def gate(self, site: Site, num_experts: int) -> BiasedGate:
        return _RankGate(num_experts, top_k=self.top_k, rate=self.bias_rate, signed=self.by == "value")

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw an expert's first factors: a_RI sparse and normal, b_RO zero."""
        density = self.top_k / self.rank if self.density is None else self.density
        a_RI = torch.zeros(rank, site.num_inputs)
        places = torch.randperm(site.num_inputs, generator=generator)[: max(1, int(density * site.num_inputs))]
        a_RI[:, places] = torch.randn(rank, len(places), generator=generator) / self.rank
        return a_RI, torch.zeros(rank, site.num_outputs)


class _RankGate(BiasedGate):
    """A gate that chooses ranks by the outputs A x of the layer's own factor a, given to it as input."""

    def __init__(self, num_experts: int, *, top_k: int, rate: float, signed: bool) -> None:
        super().__init__(num_experts, top_k=top_k, rate=rate)
        self.signed = signed

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        biased_BTE = x_BTI + self.bias_E
        return Weighing(self.chosen(biased_BTE if self.signed else biased_BTE.abs()))
