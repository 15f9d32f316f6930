"""What a form of experts is: a module for each place, which makes the place's output from the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from loraweave.routers.experts._recipe import ExpertShape, Recipe, Site
from loraweave.types import Factors

# w_BTE of the experts of the site for its input x_BTI
Weigh = Callable[[Tensor], Tensor]


class Form(Protocol):
    """The class of a file of this folder."""

    # whether the sum of its experts at constant weights is an update of the layer, as factors
    is_update: ClassVar[bool]

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None: ...

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        """The places that the recipe's target modules name, in the model's order. Raises UnknownName where one names none,
        LayerMismatch where a place cannot have experts of this form."""

    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Puts in what each expert begins with: (a_RI, b_RO)."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], y: Tensor, weigh: Weigh) -> Tensor:
        """The output of the place, whose module gave y for `args`; maybe in y's own memory."""

    def factors(self, w_E: Tensor) -> Factors:
        """The update that the experts make at these constant weights, as detached fp32 copies on the CPU."""


def placed(module: nn.Module, like: Tensor) -> nn.Module:
    """The module on the device of a tensor of the base; parameters are fp32, or fp64 where the base is."""
    return module.to(like.device, torch.promote_types(like.dtype, torch.float32))
