"""Factors of rank 1 in two pools, from which each row gets the best-scored few of each, paired in order of their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.extend.live import own_precision
from loraweave.extend.models import by_row, linear
from loraweave.extend.recipes import Args, ExpertShape, Form, Recipe, Site, Weigh, fitting, layer_sites
from loraweave.extend.training import seeded
from loraweave.extensions.recipes.recipes.mixlora_conditional import MixloraConditional


class SelectedFactors(Form):
    """The form y0 + scale * sum over p of b_p (a_p dropout(x)); a_p and b_p are the factors with a row's p-th best scores.

    A site's weights are the scores of all factors a, then those of all b. With k_REI, scores of b gain `a_weight` *
    softmax(sum over p of softmax(k_p a_p)).
    """

    recipe: MixloraConditional

    def __init__(self, recipe: MixloraConditional, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        self.recipe = recipe
        self.a_EI = nn.Parameter(torch.zeros(shape.num_experts, site.num_inputs))
        self.b_EO = nn.Parameter(torch.zeros(shape.num_experts, site.num_outputs))
        k_REI = torch.zeros(recipe.rank, shape.num_experts, site.num_inputs)
        self.k_REI = nn.Parameter(k_REI, requires_grad=not recipe.as_released) if recipe.conditional else None

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        return layer_sites(model, recipe.target_modules, kinds=(linear,))

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the factors to their starts; draw k_REI as torch draws a linear layer of all chosen factors on end."""
        own_a, own_b = zip(*starts, strict=True)
        self.a_EI.copy_(torch.cat(own_a))
        self.b_EO.copy_(torch.cat(own_b))
        if self.k_REI is not None:
            bound = (self.recipe.rank * self.site.num_inputs) ** -0.5
            self.k_REI.uniform_(-bound, bound, generator=seeded(self.recipe.seed, "conditional", self.site.name))

    def forward(self, module: nn.Module, args: Args, y: Tensor, weigh: Weigh) -> Tensor:
        """Return y plus the update. Raises ScopeError, naming layer and both counts, if the weights are for other rows."""
        x_BTI, y_BTO = by_row(args[0]), by_row(y)
        scores_BTE = fitting(weigh(x_BTI), self.site, *x_BTI.shape[:2])
        of_a_BE, of_b_BE = scores_BTE[:, 0].chunk(2, dim=1)
        a_BRI, a_BR = self._chosen(self.a_EI, of_a_BE)
        if self.k_REI is not None:
            # the chosen factors a, as they enter the layer
            with own_precision(y.device):
                along_BRE = torch.einsum("bri,rei->bre", a_BRI * a_BR[..., None], self.k_REI)
            of_b_BE = of_b_BE + self.recipe.a_weight * along_BRE.softmax(dim=-1).sum(dim=1).softmax(dim=-1)
            b_BRO, b_BR = self._chosen(self.b_EO, of_b_BE, of_b_BE.softmax(dim=-1))
        else:
            b_BRO, b_BR = self._chosen(self.b_EO, of_b_BE)
        dtype = torch.get_autocast_dtype(y.device.type) if torch.is_autocast_enabled(y.device.type) else y.dtype
        x_BTI = functional.dropout(x_BTI, self.recipe.dropout, self.training).to(dtype)
        w_BR = a_BR * b_BR * self.recipe.scale
        inner_BTR = (x_BTI @ a_BRI.to(dtype).transpose(1, 2)) * w_BR[:, None].to(dtype)
        return (y_BTO + (inner_BTR @ b_BRO.to(dtype)).to(y.dtype)).view(y.shape)

    def _chosen(self, factors: Tensor, scores_BE: Tensor, p_BE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (factors, ones_BR): each row's R best-scored factors, best first; ones that pass a gradient to p_BE.

        p_BE is by default the scores themselves.
        """
        best_BR = scores_BE.topk(self.recipe.rank, dim=1).indices
        p_BR = (scores_BE if p_BE is None else p_BE).gather(1, best_BR)
        ones_BR = torch.ones_like(p_BR)
        if not (self.recipe.as_released or not p_BR.requires_grad):
            ones_BR = ones_BR + (p_BR - p_BR.detach())
        return factors[best_BR], ones_BR
