"""The base class of the forms of experts: modules, one for each site, that compute the site's output from the base's."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.common.process import holding
from loraweave.composer.experts.running import RUNNING, Running
from loraweave.errors import ScopeError
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.types import Factors

# w_BTE of the experts of the site for its input x_BTI
Weigh = Callable[[Tensor], Tensor]
# the positional arguments of a module's call
Args = tuple[Any, ...]
Seen = dict[str, Any]


class Form(nn.Module, ABC):
    """The base class of the forms in this folder: the experts of one site as a module.

    For sites with parts, `before` and `after` run around each part, where `module` is that of the whole site and `seen` a
    dict for their own use, empty at the start of each run of the site; for other sites `forward` runs. A form defines the
    methods that run for its sites, and `factors` if it `is_update`.
    """

    # True if the sum of its experts at constant weights can be written as factors of the layer's update
    is_update: bool = False
    # True if a model with such experts generates tokens
    generates: bool = True

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None:
        super().__init__()
        self.site = site
        self.shape = shape
        self.scale = recipe.scale
        self.dropout = recipe.dropout

    @staticmethod
    @abstractmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        """Return the sites that match the recipe's target modules, in the model's order.

        Raises UnknownName for a target without a match, LayerMismatch for a module that cannot have experts of this form.
        """
        # called on the class, before a form is made
        raise NotImplementedError

    @classmethod
    def run(cls, model: Any, running: Running, args: Args, kwargs: Mapping[str, Any]) -> Any:
        """Return the output of a call of the expert model `model`, by default its base's for `args` and `kwargs`."""
        with holding(RUNNING, running):
            return model.base_model(*args, **kwargs)

    @staticmethod
    def current() -> Running | None:
        """Return the running call of an expert model, or None."""
        return RUNNING.get()

    @staticmethod
    def blocks(model: nn.Module, recipe: Recipe, sites: Collection[str]) -> list[str]:
        """Return the paths of modules, beside the sites, around which `before_block` and `after_block` run."""
        return []

    @staticmethod
    def before_block(running: Running, block: str, args: Args) -> Args | None:
        """Return new arguments for a block, named by its path, or None to keep `args`."""
        return None

    @staticmethod
    def after_block(running: Running, block: str, output: Any) -> Any:
        """Return a new output of the block, or None to keep `output`."""
        return None

    @abstractmethod
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set each expert to its start (a_RI, b_RO); starts are ordered by part of the site, then by expert."""

    @property
    def moved(self) -> list[nn.Parameter]:
        """The parameters without a gradient that the form's own forward changes in training."""
        return []

    def forward(self, module: nn.Module, args: Args, y: Tensor, weigh: Weigh) -> Tensor:
        """Return the site's new output for `args`, maybe in the memory of y, the old one. `weigh(x_BTI)` returns w_BTE."""
        raise NotImplementedError

    def before(self, part: int, module: nn.Module, args: Args, weigh: Weigh, seen: Seen) -> Args:
        """Return new arguments for part number `part` of the site, in place of `args`. `weigh(x_BTI)` returns w_BTE."""
        raise NotImplementedError

    def after(self, part: int, module: nn.Module, args: Args, y: Tensor, seen: Seen) -> Tensor:
        """Return a new output of part number `part` of the site, in place of y, which the part returned for `args`."""
        raise NotImplementedError

    def factors(self, w_E: Tensor) -> Factors:
        """Return the experts' update at constant weights w_E, as detached fp32 copies on the CPU."""
        raise NotImplementedError


def place_like(module: nn.Module, like: Tensor) -> nn.Module:
    """Move the module to the device of `like`, a tensor of the base, in fp32 (fp64 if `like` is); return the module."""
    return module.to(like.device, torch.promote_types(like.dtype, torch.float32))


def fitting(w_BTE: Tensor, site: Site, num_rows: int, num_tokens: int) -> Tensor:
    """Return w_BTE in fp32 or better, with B 1 or `num_rows` and T 1 or `num_tokens`.

    Where the model splits a row into consecutive windows, each window gets its row's weights. Raises ScopeError, naming the
    site and both counts, if the weights are for other numbers of rows or tokens.
    """
    # if the second axis is as long as the batch, it may be the axis of rows
    copies, beyond = divmod(num_rows, len(w_BTE))
    if w_BTE.shape[1] == 1 and copies > 1 and not beyond and num_tokens not in (1, len(w_BTE)):
        w_BTE = w_BTE.repeat_interleave(copies, dim=0)
    if w_BTE.shape[0] not in (1, num_rows) or w_BTE.shape[1] not in (1, num_tokens):
        raise ScopeError(
            f"the weights are for {w_BTE.shape[0]} rows of {w_BTE.shape[1]} tokens, but layer {site.name!r} sees "
            f"{num_rows} of {num_tokens}: leave it out of target_modules, or take a gate that looks at the layer's input"
        )
    return w_BTE.to(torch.promote_types(w_BTE.dtype, torch.float32))
