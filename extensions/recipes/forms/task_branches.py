"""Experts of a shared stream of activations, and of the branches that leave it for each row's task."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import ScopeError
from loraweave.extend.models import conv, linear
from loraweave.extend.recipes import Args, ExpertShape, Recipe, Running, Site, SumOfExperts, Weigh
from loraweave.extensions.recipes.recipes.mtlora import Branch, BranchSite, Mtlora, closing_blocks


class TaskBranches(SumOfExperts):
    """The updates of a layer's experts: of the shared one in the shared stream, of each task's own in the task's branch.

    The recipe's `mode` says whether a branch adds to the base's output there, or to all of the shared stream's output. With
    "addition" the shared stream has y0 + LayerNorm(sum over t of y_t), so that the streams of all tasks run beside it.
    """

    # a branch adds to another stream's output
    is_update = False
    generates = False

    def __init__(self, recipe: Mtlora, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        self.mode = recipe.mode
        self.num_tasks = len(recipe.tasks)
        self.is_branched = recipe.is_branched(site)
        self.norm: nn.LayerNorm | None = None
        if self.is_branched and self.mode == "addition":
            self.norm = nn.LayerNorm(site.num_outputs)
            nn.init.constant_(self.norm.weight, float(recipe.as_released))

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        closing = tuple(f"{block}." for block in closing_blocks(model))
        sites = SumOfExperts.sites(model, recipe)
        return [BranchSite(**vars(site), closing=site.block is None or site.name.startswith(closing)) for site in sites]

    @staticmethod
    def blocks(model: nn.Module, recipe: Recipe, sites: Collection[str]) -> list[str]:
        return [block for block in closing_blocks(model) if any(name.startswith(f"{block}.") for name in sites)]

    @classmethod
    def run(cls, model: Any, running: Running, args: Args, kwargs: Mapping[str, Any]) -> Any:
        """Run the shared stream, and then the branches. Raises ScopeError for a cache."""
        if kwargs.get("past_key_values") is not None:
            raise ScopeError(
                f"recipe {model.recipe.name!r} runs the model twice and takes no cache: give all tokens at once"
            )
        shared = Branch(num_streams=model.recipe.num_streams)
        without_labels = {name: value for name, value in kwargs.items() if name != "labels"}
        super().run(model, Running(model, beside=shared), args, without_labels)
        running.beside = Branch(left=True, noted=shared.noted)
        return super().run(model, running, args, kwargs)

    @staticmethod
    def before_block(running: Running, block: str, args: Args) -> Args | None:
        branch: Branch | None = running.beside
        return None if branch is None else branch.enter(block, args)

    @staticmethod
    def after_block(running: Running, block: str, output: Any) -> Any:
        branch: Branch | None = running.beside
        return None if branch is None else branch.leave(output)

    def gate_input(self, module: nn.Module, x: Tensor) -> Tensor:
        # the tasks alone decide
        return x.new_empty(0) if self.site.kernel else super().gate_input(module, x)

    def forward(self, module: nn.Module, args: Args, y: Tensor, weigh: Weigh) -> Tensor:
        running = self.current()
        branch: Branch | None = None if running is None else running.beside
        if branch is None or not self.is_branched:
            return super().forward(module, args, y, weigh)
        if branch.left:
            return super().forward(module, args, branch.take(self.site.name), weigh)
        if self.norm is not None:
            y0, made = self._sum(module, args, y, weigh)
        else:
            y0 = y.clone()
            made = super().forward(module, args, y, weigh)
        branch.note(self.site.name, made.clone() if self.mode == "matrixv2" else y0)
        return made

    def _sum(self, module: nn.Module, args: Args, y: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
        """Return (y0, all streams stacked along the rows: y0 + LayerNorm(sum over t of y_t), then each task's y_t)."""
        assert self.norm is not None
        num_streams = self.num_tasks + 1
        y0 = y[: len(y) // num_streams].clone()

        def weigh_streams(x_BTI: Tensor) -> Tensor:
            own_SE = weigh(x_BTI)[0, 0].diag()
            return torch.cat([torch.zeros_like(own_SE[:1]), own_SE])[:, None].repeat_interleave(len(y0), dim=0)

        y_t = super().forward(module, args, torch.cat([y0] * num_streams), weigh_streams)[len(y0) :]
        kind = conv if self.site.kernel else linear
        summed_BTO = kind.rows(module, torch.stack(y_t.chunk(self.num_tasks)).sum(dim=0))
        normed_BTO: Tensor = self.norm(summed_BTO.to(self.norm.weight.dtype))
        return y0, torch.cat([y0 + kind.put_back(normed_BTO.to(y0.dtype), y0), y_t])
