"""What LD-MoLE's recipe and router weigh by: shares on the simplex, and the network that says how many of them are 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def sparsegen(scores_BTE: Tensor, lambda_BT1: Tensor) -> Tensor:
    """Return p_BTE = argmin over the simplex of |p - u|^2 - lambda |p|^2 for the scores u, with a lambda below 1.

    p = max(u - tau, 0) / (1 - lambda), with the tau that makes it sum to 1: lambda = 0 is sparsemax, towards 1 the highest
    score gets all, towards -inf all get alike. Scores of -inf get 0. Gradients reach scores and lambda.
    """
    sorted_BTE = scores_BTE.sort(dim=-1, descending=True).values
    with torch.no_grad():
        number_E = torch.arange(1, scores_BTE.shape[-1] + 1, device=scores_BTE.device)
        # number * -inf > -inf is false, so that absent scores are outside
        inside_BTE = 1 - lambda_BT1 + number_E * sorted_BTE > sorted_BTE.cumsum(dim=-1)
        num_inside_BT1 = inside_BTE.sum(dim=-1, keepdim=True)
    total_BT1 = torch.where(inside_BTE, sorted_BTE, 0.0).sum(dim=-1, keepdim=True)
    tau_BT1 = (total_BT1 - 1 + lambda_BT1) / num_inside_BT1
    return (scores_BTE - tau_BT1).clamp_min(0) / (1 - lambda_BT1)


def least_lambda(scores_BTE: Tensor, num_shares: int) -> Tensor:
    """Return the least lambda_BT1 that leaves at most so many shares above 0: 1 - sum over the highest u of (u - next u).

    -inf where no more scores than that are finite.
    """
    best_BTK = scores_BTE.topk(num_shares + 1, dim=-1).values
    gaps_BTK = (best_BTK[..., :-1] - best_BTK[..., -1:]).nan_to_num(nan=0.0, posinf=math.inf)
    return 1 - gaps_BTK.sum(dim=-1, keepdim=True)


# how far lambda stays below 1
MARGIN = 0.01
# the last bias of lambda at the start
START = -2.5


class Lambda(nn.Module):
    """A network for lambda(x) = 0.99 + logsigmoid(MLP(x)), with `hidden` ReLU units.

    It is drawn as torch draws linear layers, with a last bias of -2.5, so that lambda begins around -1.6, as published. The
    published hidden units begin at -2.5, too, where most inputs leave them at 0 and without a gradient; here they begin at
    0.
    """

    def __init__(self, num_inputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, hidden)
        self.last = nn.Linear(hidden, 1)
        self.reset_biases()

    @torch.no_grad()
    def reset_biases(self) -> None:
        self.first.bias.zero_()
        self.last.bias.fill_(START)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return lambda_BT1, below 0.99."""
        out_BT1: Tensor = self.last(self.first(x_BTI.to(self.first.weight.dtype)).relu())
        return 1 - MARGIN + functional.logsigmoid(out_BT1)
