"""LD-MoLE (Zhuang et al. 2025, arXiv 2509.25684): a router that also learns the number of adapters of each token."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loraweave import ExpertPool
from loraweave.extend import Count, NonNegative
from loraweave.extend.routing import InputGates, Members, Step
from loraweave.extensions.recipes.recipes.ld_mole import Lambda, shortfall, sparsegen


class LdMole(InputGates):
    """A router with w = sparsegen(g x, lambda(x)): shares that sum to 1; a larger lambda (below 1) makes more of them 0.

    g_EI is each layer's own, drawn as torch draws linear layers. lambda(x) = 0.99 + logsigmoid(MLP(x)) (`Lambda`) has one
    MLP of `hidden` units for all layers with as many inputs, as published (256 there): near 0.99 the best expert gets all,
    and for lower values more experts take part. Weights and their number are continuous in the input: gradients reach both.

    `sparsity`, 0 or more, is the coefficient of a loss that draws towards at most `target` experts a token: the mean over
    real tokens and layers of how far lambda is below the least value with no more experts, and 0 otherwise; it has no
    gradient to the scores.
    """

    def __init__(
        self, pool: ExpertPool | Members, *, hidden: Count = 256, sparsity: NonNegative = 0.0, target: Count = 2
    ) -> None:
        super().__init__(pool)
        self.hidden = hidden
        self.sparsity = sparsity
        self.target = target
        widths = sorted({layer.num_inputs for layer in self.members.layers.values() if layer.num_inputs})
        self.lambdas_ = nn.ModuleDict({str(width): Lambda(width, hidden) for width in widths})

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; each token's weights sum to 1."""
        scores_BTE = self.scores(x_BTI, layer)
        lambda_BT1 = self.lambdas(x_BTI, layer)
        return self.note(layer, scores_BTE, sparsegen(scores_BTE, lambda_BT1), lambda_BT1)

    def lambdas(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return lambda_BT1, below 0.99; 0 in a layer where no expert has factors."""
        width = str(self.members.layers[layer].num_inputs)
        if width not in self.lambdas_:
            return x_BTI.new_zeros(*x_BTI.shape[:2], 1, dtype=torch.float32)
        found_BT1: Tensor = self.lambdas_[width](x_BTI)
        return found_BT1

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"sparsity": sparsity * the mean of max(0, least lambda - lambda)}, {} where it cannot be above 0."""
        moved = self.sparsity and len(self.experts) > self.target and step.scores
        return {"sparsity": self.sparsity * shortfall(step, self.target)} if moved else {}
