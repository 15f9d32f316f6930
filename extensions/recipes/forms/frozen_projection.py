"""The sum of experts whose factors a are frozen, with a gate that sees the outputs of these factors."""

from torch import Tensor, nn
from torch.nn import functional

from loraweave.extend.models import conv, linear
from loraweave.extend.recipes import ExpertShape, Recipe, Site, SumOfExperts


class FrozenProjection(SumOfExperts):
    """The form y0 + scale * sum over e of w_e(A x) * (dropout(x) a_e^T) b_e^T; A, all factors a stacked, has no gradient."""

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        self.a_SI.requires_grad_(False)

    def gate_input(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.site.kernel:
            return conv.project(module, x.to(self.a_SI.dtype), self.a_SI)
        return functional.linear(linear.inputs(module, x, self.a_SI).to(self.a_SI.dtype), self.a_SI)
