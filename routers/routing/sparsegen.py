"""Sparsegen-lin (Laha et al., NeurIPS 2018, arXiv 1811.00319): shares of which as many are 0 as a number says."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sparsegen(scores_BTE: Tensor, lambda_BT1: Tensor) -> Tensor:
    """p_BTE = argmin over the simplex of |p - u|^2 - lambda |p|^2 for the scores u, with a lambda below 1.

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
    """The least lambda_BT1 with which at most so many shares are above 0: 1 - sum over the highest u of (u - next u).

    -inf where no more scores than that are finite.
    """
    best_BTK = scores_BTE.topk(num_shares + 1, dim=-1).values
    gaps_BTK = (best_BTK[..., :-1] - best_BTK[..., -1:]).nan_to_num(nan=0.0, posinf=math.inf)
    return 1 - gaps_BTK.sum(dim=-1, keepdim=True)
