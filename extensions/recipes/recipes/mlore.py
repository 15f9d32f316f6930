"""MLoRE (Yang et al. 2024, arXiv 2403.17749): low-rank convolutions of different ranks, mixed for each task and image."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import ScopeError
from loraweave.extend import Count, NonNegative, traits
from loraweave.extend.recipes import Call, ExpertShape, Gate, Recipe, Site, Weighing, uniform
from loraweave.extend.routing import Step, top_k_softmax
from loraweave.extensions.recipes.limited_gate import top_k_of_softmax
from loraweave.extensions.recipes.losses.cv_squared import cv_squared


@traits("images")
@dataclass(frozen=True, kw_only=True)
class Mlore(Recipe):
    """The sum y0 + sum over e of w_e(task, x) B_e A_e x + G x + p(task, x) B_task A_task x, each A with the layer's kernel.

    `ranks` are those of the mixed experts, of which each image has `top_k`, and `rank` that of each task's own. G, the path
    that all share, is as free as the layer's weight; `generic` False leaves it out. The gate is a `SpatialGate`, with noise
    in training. With `renormalised` the weights of an image sum to 1, as released for NYUD-v2; without, softmax is over all
    experts, as released for PASCAL-Context. `balance` times the sum over layers of the loss `cv_squared` of the mean weights
    is added. Defaults are those for PASCAL-Context, except for `renormalised`.

    Here the sum is the update of a convolution of the base. Every B begins as 0, so that training begins at the base. In
    evaluation a row's weights are constants, and the sum one convolution: W + sum of w B A.

    The published block is a head of its own. With `as_released` it stands in the convolution's place (the form
    `convolution_block`): biases, BatchNorms, a GELU and 1 x 1 convolutions of each task are around the sum, G gives its
    input no gradient, and B begins uniform, so that nothing begins at the base. With `positions`, their number in an image,
    the gate learns for each what it counts in the mean, as published, and refuses images of another number.
    """

    rank: Count = 72
    ranks: tuple[Count, ...] = (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128)
    top_k: Count = 9
    generic: bool = True
    renormalised: bool = True
    balance: NonNegative = 0.0003
    # the convolutions of UperNet, and of decoders after its pattern
    target_modules: tuple[str, ...] = ("conv",)
    as_released: bool = False
    positions: Count | None = None

    form: ClassVar[str] = "convolution_block"
    needs_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self.refuse("alpha", "it takes None: the gate alone scales the sum")
        if self.as_released and self.dropout:
            self.refuse("dropout", "it takes 0 with as_released: the released block has none")
        if not self.ranks:
            self.refuse("ranks", "it takes the rank of each mixed expert")
        self.require_top_k(len(self.ranks))

    @property
    def scale(self) -> float:
        return 1.0

    def shape(self, site: Site) -> ExpertShape:
        if not self.tasks:
            self.refuse("tasks", "name those that get experts of their own")
        generic = (min(site.num_inputs, site.num_outputs),) if self.generic else ()
        return ExpertShape(self.ranks + generic + (self.rank,) * len(self.tasks))

    def roles(self, site: Site, shape: ExpertShape) -> tuple[Hashable, ...]:
        # scores of another number of mixed experts lie elsewhere in the gate
        mixed = [(len(self.ranks), place) for place in range(len(self.ranks))]
        return (*mixed, *(("generic",) if self.generic else ()), *(("task", task) for task in self.tasks))

    def gate(self, site: Site, num_experts: int) -> SpatialGate:
        return SpatialGate(self, site.num_inputs // math.prod(site.kernel))

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        a_RI, b_RO = super().start(site, expert, rank, generator)
        return a_RI, uniform(site.num_outputs, rank, generator).T if self.as_released else b_RO

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if not self.balance:
            return {}
        uses = [w_BTE[..., : len(self.ranks)].flatten(0, 1).mean(dim=0) for w_BTE in step.weights.values()]
        return {"balance": self.balance * torch.stack([cv_squared(use_E) for use_E in uses]).sum()}


class SpatialGate(Gate):
    """A gate for each task: (m, s, p) = V [mean over positions of U3 GELU(LN(U1 x)), U2 GELU(LN(mean over positions of x))].

    Given a number of `positions`, the second mean is a learned sum over them, with a bias.

    The weights are, in this order: those of the mixed experts, softmax over the `top_k` highest m + s * noise (over all
    experts if not `renormalised`), else 0; 1 for the generic expert, if there is one; p for the expert of the row's task, 0
    for those of other tasks. Noise is in training alone. U, LN and V are the task's own; x_BTC has channels by position.
    """

    def __init__(self, recipe: Mlore, num_channels: int) -> None:
        num_mixed, num_tasks, generic, positions = len(recipe.ranks), len(recipe.tasks), recipe.generic, recipe.positions
        super().__init__(num_mixed + generic + num_tasks, most=recipe.top_k + generic + 1)
        self.num_mixed, self.num_tasks, self.generic = num_mixed, num_tasks, generic
        self.top_k, self.choose = recipe.top_k, top_k_softmax if recipe.renormalised else top_k_of_softmax
        # LayerNorm of fewer than 4 values keeps almost no information
        width = max(4, num_channels // 4)
        self.u1, self.norm1 = TaskLinear(num_tasks, num_channels, width), _Norm(num_tasks, width)
        self.u3 = TaskLinear(num_tasks, width, width)
        self.norm2, self.u2 = _Norm(num_tasks, num_channels), TaskLinear(num_tasks, num_channels, width)
        self.v = TaskLinear(num_tasks, 2 * width, 2 * num_mixed + 1)
        self.over_positions = None if positions is None else TaskLinear(num_tasks, positions, 1)

    def reset(self, generator: torch.Generator) -> None:
        """Draw each U, V and their biases uniformly between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        for part in (self.u1, self.u3, self.u2, self.v, self.over_positions):
            if part is not None:
                part.reset(generator)

    def forward(self, x_BTC: Tensor, call: Call) -> Weighing:
        """Weigh the experts of each image. Raises ScopeError for texts, parts of images and images without a task."""
        task_B = image_tasks(x_BTC, call)
        x_BTC = x_BTC.to(self.v.weight_KOI.dtype)
        each_B1H = self.u3(functional.gelu(self.norm1(self.u1(x_BTC, task_B), task_B)), task_B).mean(dim=1, keepdim=True)
        mean_B1H = self.u2(functional.gelu(self.norm2(self._mean(x_BTC, task_B), task_B)), task_B)
        made_B1V = self.v(torch.cat([each_B1H, mean_B1H], dim=-1), task_B)
        scores_B1E, spread_B1E, p_B11 = made_B1V.split([self.num_mixed, self.num_mixed, 1], dim=-1)
        if self.training:
            scores_B1E = scores_B1E + spread_B1E * torch.randn_like(spread_B1E)
        ones_B1G = torch.ones_like(p_B11).expand(-1, -1, int(self.generic))
        own_B1K = functional.one_hot(task_B, self.num_tasks).to(p_B11)[:, None] * p_B11
        return Weighing(torch.cat([self.choose(scores_B1E, self.top_k), ones_B1G, own_B1K], dim=-1), scores_B1E)

    def _mean(self, x_BTC: Tensor, task_B: Tensor) -> Tensor:
        if self.over_positions is None:
            return x_BTC.mean(dim=1, keepdim=True)
        known = self.over_positions.weight_KOI.shape[2]
        if x_BTC.shape[1] != known:
            raise ScopeError(
                f"the gate has learned weights of {known} positions, and this image has {x_BTC.shape[1]}: give images of "
                "one size, or leave out positions"
            )
        mean_BC1: Tensor = self.over_positions(x_BTC.mT, task_B)
        return mean_BC1.mT


def image_tasks(x_BTC: Tensor, call: Call) -> Tensor:
    """Return task_B, each image's task. Raises ScopeError for texts, parts of images and images without a task."""
    if call.ids_BT is not None or call.follows:
        raise ScopeError("the gate looks at all positions of an image at once: for texts, take a recipe with another gate")
    if call.task_B is None:
        raise ScopeError("the gate looks at the task of each row, and this call has none: give task=..., one for each row")
    if len(call.task_B) != len(x_BTC):
        raise ScopeError(
            f"the gate looks at whole images, {len(call.task_B)} in this call, but its layer sees {len(x_BTC)} parts of "
            "them: leave layers that see windows out of target_modules"
        )
    return call.task_B


class TaskLinear(nn.Module):
    """A linear layer x W^T + bias with the W and bias of each row's task."""

    def __init__(self, num_tasks: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight_KOI = nn.Parameter(torch.empty(num_tasks, num_outputs, num_inputs))
        self.bias_KO = nn.Parameter(torch.empty(num_tasks, num_outputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.weight_KOI.shape[2])
        self.weight_KOI.uniform_(-bound, bound, generator=generator)
        self.bias_KO.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        return x_BTI @ self.weight_KOI[task_B].mT + self.bias_KO[task_B][:, None]


class _Norm(nn.Module):
    """A LayerNorm with the factor and bias of each row's task."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight_KI = nn.Parameter(torch.ones(num_tasks, num_features))
        self.bias_KI = nn.Parameter(torch.zeros(num_tasks, num_features))

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        normed_BTI = functional.layer_norm(x_BTI, x_BTI.shape[-1:])
        return normed_BTI * self.weight_KI[task_B][:, None] + self.bias_KI[task_B][:, None]
