"""PHATGOOSE (Muqeeth et al., ICML 2024, arXiv 2402.05859): a gate for each adapter, trained independently."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import ExpertPool
from loraweave.extend import Count
from loraweave.extend.routing import InputGates, Members, Step, top_k_softmax, without

TOP_K = 2


class Phatgoose(InputGates):
    """A router with w = softmax over the `top_k` largest N(x) . N(v_e) / sqrt(I), N a layer norm without parameters.

    `top_k` is by default 2, as published, or 1 for a pool of one. Scores are between -sqrt(I) and sqrt(I).

    The gate v_e of each adapter and layer starts at 0 and learns from rows of the adapter's own task (`fit` takes a dataset
    that names them): there the adapter alone is active, with weight sigmoid(v_e . x). No gate's gradient depends on
    another's rows, so any number of them can be trained together. So a gate is the same, up to the rounding of
    batches of another length, whichever are trained beside it; one without rows keeps its bits (with no weight decay).
    `add_expert` gives a new adapter's gate without training the others: `fit` it on the new adapter's rows.

    A gate of zeros, which has not been trained, gives its adapter no weight in its layer; where all are, all weigh alike.
    """

    per_expert: ClassVar = {"gates_": None}
    counts: ClassVar[tuple[str, ...]] = ("top_k",)
    needs_experts: ClassVar[bool] = True
    apart: ClassVar[bool] = True
    lr: ClassVar[float] = 5e-3

    def __init__(self, pool: ExpertPool | Members, *, top_k: Count | None = None) -> None:
        super().__init__(pool, torch.zeros)
        self.top_k = min(TOP_K, len(self.experts)) if top_k is None else top_k

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE: they sum to 1, but in a step of training are sigmoid(v_e . x) of the row's own expert e alone."""
        if self.step is not None:
            return self._alone(x_BTI, layer, self.step)
        present = self.members.layers[layer].experts
        if layer not in self.gates_:
            return self.scores(x_BTI, layer).softmax(dim=-1)
        v_EI = self.gates_[layer]
        trained_E = v_EI.detach().ne(0).any(dim=1)
        size = v_EI.shape[1:]
        scores_BTE = functional.layer_norm(x_BTI.to(v_EI.dtype), size) @ functional.layer_norm(v_EI, size).T / size[0] ** 0.5
        chosen_BTE = top_k_softmax(without(scores_BTE, present).masked_fill(~trained_E, -torch.inf), self.top_k)
        alike_E = without(torch.zeros_like(v_EI[:, 0]), present).softmax(dim=0)
        return torch.where(trained_E.any(), chosen_BTE, alike_E)

    def _alone(self, x_BTI: Tensor, layer: str, step: Step) -> Tensor:
        own_B1E = functional.one_hot(step.expert_B, len(self.experts))[:, None].bool()
        scores_BT1 = self._of_own(x_BTI, layer, step.expert_B)
        absent_E = without(torch.zeros_like(scores_BT1[0, 0].expand(len(self.experts))), self.members.layers[layer].experts)
        w_BTE = torch.where(own_B1E & absent_E.eq(0), scores_BT1.sigmoid(), 0.0)
        return self.note(layer, torch.where(own_B1E, scores_BT1, -torch.inf), w_BTE)

    def _of_own(self, x_BTI: Tensor, layer: str, expert_B: Tensor) -> Tensor:
        """Return v_e . x, (B, T, 1), where `expert_B` is the index e of each row's own expert."""
        if layer not in self.gates_:
            return x_BTI.new_zeros(*x_BTI.shape[:2], 1, dtype=torch.float32)
        v_EI = self.gates_[layer]
        return x_BTI.to(v_EI.dtype) @ v_EI[expert_B][:, :, None]
