"""Terms that keep a router's experts in use and its scores small."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.routers.losses.z import z
from loraweave.routers.routing.learned_router import Step


def balance_loss(step: Step) -> Tensor:
    """E * sum over e of f_e p_e, a mean over layers (Fedus et al. 2021, arXiv 2101.03961, for weights of any top-k).

    p_e is the mean of softmax(scores), f_e that of the weights as shares, without a gradient, over the real tokens; E counts
    the layer's own experts. 1 where all get alike, for every top-k, and E where one gets all.
    """
    losses = []
    for layer, scores_BTE in step.scores.items():
        scores_NE, w_NE = step.real(scores_BTE), step.real(step.weights[layer]).detach()
        total_N1 = w_NE.sum(dim=1, keepdim=True)
        # a token to which its layer gives nothing has no shares
        share_E = (w_NE / total_N1.where(total_N1 != 0, 1.0)).mean(dim=0)
        num_experts = int((scores_NE > -torch.inf).any(dim=0).sum())
        losses.append(num_experts * (share_E * scores_NE.softmax(dim=1).mean(dim=0)).sum())
    return torch.stack(losses).mean()


def z_loss(step: Step) -> Tensor:
    """The mean over real tokens and layers of logsumexp(scores)^2 (Zoph et al. 2022, arXiv 2202.08906)."""
    return torch.stack([z(step.real(scores_BTE)) for scores_BTE in step.scores.values()]).mean()
