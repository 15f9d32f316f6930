"""MeteoRA (Xu et al., ICLR 2025, arXiv 2405.13053): each layer learns which adapters a token needs, also where tasks mix."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import ExpertPool
from loraweave.extend import Count, NonNegative, Positive
from loraweave.extend.routing import InputGates, Members, Step, top_k_softmax


class Meteora(InputGates):
    """A router with w = softmax over the `top_k` highest g x / temperature, g_EI learned by layer and drawn from N(0, 1).

    The dataset of `fit` names the expert of each row, and `eta` times the cross-entropy of softmax(g x) with it, one mean
    over the real tokens of all layers, is added to the loss of the model. A layer that a row's own expert does not update
    learns nothing from the row. Each token and layer decides for itself, so that rows which hold tasks one after the other
    are mixed task by task, though no such row was learned from: for them the authors set the temperature to 15, 20 or 30 (3,
    5 or 10 tasks), with which the two best weigh nearly the same: `lw.router("meteora", pool, temperature=15)`, with this
    one's `state_dict()`.

    `top_k` is 2 as published, or the pool's size if that is smaller; `eta`, 0 or more, is 50 as released, where the last
    token of a row does not count.
    """

    needs_experts: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ("top_k",)
    lr: ClassVar[float] = 1e-2

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        top_k: Count | None = None,
        temperature: Positive = 1.0,
        eta: NonNegative = 50.0,
    ) -> None:
        super().__init__(pool, lambda num_experts, num_inputs: torch.randn(num_experts, num_inputs))
        self.top_k = min(2, len(self.experts)) if top_k is None else top_k
        self.temperature, self.eta = temperature, eta

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; each token's weights sum to 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, top_k_softmax(scores_BTE, self.top_k, self.temperature))

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"domain": eta * the cross-entropy with each row's own expert}, or {} without any."""
        pairs = [pair for pair in taught(self, step) if len(pair[1])]
        if not self.eta or not pairs:
            return {}
        scores_NE, expert_N = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return {"domain": self.eta * functional.cross_entropy(scores_NE, expert_N)}


def taught(router: InputGates, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's (scores_NE, expert_N) of the real tokens of rows whose own expert updates it."""
    for layer, scores_BTE in step.scores.items():
        num_tokens = scores_BTE.shape[1]
        real_BT = step.mask_of(num_tokens)
        if real_BT is None or real_BT.shape[1] != num_tokens:
            real_BT = step.mask_BT.new_ones(1, num_tokens).bool()
        present_P = torch.tensor(router.members.layers[layer].experts, device=step.expert_B.device)
        real_BT = real_BT & torch.isin(step.expert_B, present_P)[:, None]
        yield scores_BTE[real_BT], step.expert_B[:, None].expand_as(real_BT)[real_BT]
