"""Hard-Routed MoR-LoRA (Molavi et al. 2026, arXiv 2606.31413): a learned choice sends each token to one whole adapter."""

from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend.routing import InputGates, Members, best_of


class HardRouted(InputGates):
    """A router with w exactly 1 for the expert of the highest score g x, and 0 for the others.

    Every adapter acts at the scale that it was trained with. The gradient is that of softmax(g x) (a straight-through
    estimate), so that all scores learn. `shared`, as published, has one matrix g_EI for all layers of I inputs; without it
    each layer has its own. It starts as torch draws a linear layer. The published training also learns a small LoRA on the
    attention, which is not an expert's weight and is left out: train one with `train_adapters` and put it into the pool.
    """

    def __init__(self, pool: ExpertPool | Members, *, shared: bool = True) -> None:
        super().__init__(pool, shared=shared)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; one of each token's weights is 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, best_of(scores_BTE, scores_BTE.softmax(dim=-1)))
