"""Experts that multiply a layer's weight elementwise; each row has one expert."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from loraweave import ScopeError
from loraweave.extend.models import by_row, linear
from loraweave.extend.recipes import Args, ExpertShape, Form, Recipe, Seen, Site, Weigh, fitting, layer_sites


class Multiplied(Form):
    """The form sum over ranks r of b_er * (W (a_er * x)) + bias, where e is the expert that weighs most in the row.

    The weight is W * (b_e^T a_e), elementwise, and is never formed: the layer runs once on all rows, each as often as the
    rank and multiplied with a. Raises ScopeError for weights that vary within a row.
    """

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        rank = shape.ranks[0]
        self.a_ERI = nn.Parameter(torch.ones(shape.num_experts, rank, site.num_inputs))
        self.b_ERO = nn.Parameter(torch.ones(shape.num_experts, rank, site.num_outputs))

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        # the layer is its own part, since its input changes as well as its output
        return [replace(site, parts=(site,)) for site in layer_sites(model, recipe.target_modules, kinds=(linear,))]

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        own_a, own_b = zip(*starts, strict=True)
        self.a_ERI.copy_(torch.stack(own_a))
        self.b_ERO.copy_(torch.stack(own_b))

    def before(self, part: int, module: nn.Module, args: Args, weigh: Weigh, seen: Seen) -> Args:
        x_BTI = by_row(args[0])
        w_BTE = fitting(weigh(x_BTI), self.site, *x_BTI.shape[:2])
        if w_BTE.shape[1] > 1:
            raise ScopeError(
                f"the experts of layer {self.site.name!r} are of whole rows, but the weights vary from token to token: take "
                "a gate that looks at the task or the prompt of a row"
            )
        expert_B = w_BTE[:, 0].argmax(dim=1).expand(len(x_BTI))
        seen["expert_B"], seen["shape"] = expert_B, args[0].shape[:-1]
        a_BR1I = self.a_ERI[expert_B].to(x_BTI.dtype)[:, :, None]
        return ((x_BTI[:, None] * a_BR1I).flatten(0, 1), *args[1:])

    def after(self, part: int, module: nn.Module, args: Args, y: Tensor, seen: Seen) -> Tensor:
        b_BRO = self.b_ERO[seen["expert_B"]].to(y.dtype)
        y_BRTO = y.view(*b_BRO.shape[:2], *y.shape[1:])
        y_BTO = (y_BRTO * b_BRO[:, :, None]).sum(dim=1)
        bias_O = module.bias
        if isinstance(bias_O, Tensor):
            # each rank's product has added the bias once
            y_BTO = y_BTO + ((1 - b_BRO.sum(dim=1)) * bias_O.to(y.dtype))[:, None]
        shape: torch.Size = seen["shape"]
        return y_BTO.reshape(*shape, y.shape[-1])
