"""MLoRE (Yang et al. 2024, arXiv 2403.17749): low-rank convolutions of different ranks, mixed for each task and image."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.common.checks import is_whole
from loraweave.errors import WeightingError
from loraweave.routers.losses.cv_squared import cv_squared
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site, uniform
from loraweave.routers.recipes._token_gates import SpatialGate
from loraweave.routers.tokens._learned import Step


@dataclass(frozen=True, kw_only=True)
class Mlore(Recipe):
    """y = y0 + sum over e of w_e(task, x) B_e A_e x + G x + p(task, x) B_task A_task x, the A with the kernel of the layer.

    `ranks` are those of the mixed experts, of which each image has `top_k`, and `rank` that of each task's own. G, the path
    that all share, is as free as the layer's weight; `generic` False leaves it out. The gate is a `SpatialGate`, with noise
    in training. With `renormalised` the weights of an image sum to 1, as released for NYUD-v2; without, softmax is over all
    experts, as released for PASCAL-Context. `balance` times the sum over layers of the loss `cv_squared` of the mean weights
    is added. Defaults are those for PASCAL-Context, except for `renormalised`.

    The published block is a head of its own: it has biases, BatchNorms, a GELU and 1 x 1 convolutions of each task around
    the sum, learns for each position what it counts in the mean, and G gives its input no gradient. Here the sum is the
    update of a convolution of the base. Every B begins as 0, so that training begins at the base, and uniform with
    `as_released`.

    In evaluation a row's weights are constants, and the sum one convolution: W + sum of w B A.
    """

    rank: int = 72
    ranks: tuple[int, ...] = (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128)
    top_k: int = 9
    generic: bool = True
    renormalised: bool = True
    balance: float = 0.0003
    # the convolutions of UperNet, and of decoders after its pattern
    target_modules: tuple[str, ...] = ("conv",)
    as_released: bool = False

    needs_tasks: ClassVar[bool] = True
    gates_see = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self.refuse("alpha", "it is None: the gate alone scales the sum")
        if not self.ranks or not all(is_whole(rank, 1) for rank in self.ranks):
            self.refuse("ranks", "it has a whole number of at least 1 for each of the mixed experts")
        self.require_count("top_k", len(self.ranks))
        if not 0 <= self.balance < math.inf:
            self.refuse("balance", "it is a coefficient of a loss, 0 or more")

    @property
    def scale(self) -> float:
        return 1.0

    def shape(self, site: Site) -> ExpertShape:
        if not self.tasks:
            raise WeightingError(f"tasks of recipe {self.name!r} is (): name those that get experts of their own")
        generic = (min(site.num_inputs, site.num_outputs),) if self.generic else ()
        return ExpertShape(self.ranks + generic + (self.rank,) * len(self.tasks))

    def roles(self, site: Site, shape: ExpertShape) -> tuple[Hashable, ...]:
        # scores of another number of mixed experts lie elsewhere in the gate
        mixed = [(len(self.ranks), place) for place in range(len(self.ranks))]
        return (*mixed, *(("generic",) if self.generic else ()), *(("task", task) for task in self.tasks))

    def gate(self, site: Site, num_experts: int) -> SpatialGate:
        return SpatialGate(
            site.num_inputs // math.prod(site.kernel),
            len(self.ranks),
            len(self.tasks),
            generic=self.generic,
            top_k=self.top_k,
            renormalised=self.renormalised,
        )

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        a_RI, b_RO = super().start(site, expert, rank, generator)
        return a_RI, uniform(site.num_outputs, rank, generator).T if self.as_released else b_RO

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if not self.balance:
            return {}
        uses = [w_BTE[..., : len(self.ranks)].flatten(0, 1).mean(dim=0) for w_BTE in step.weights.values()]
        return {"balance": self.balance * torch.stack([cv_squared(use_E) for use_E in uses]).sum()}
