"""Which experts a token gets of those that its scores favour: pieces of gates, of which those for training alone draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def top_k_of_softmax(scores_BTE: Tensor, top_k: int) -> Tensor:
    """w_BTE: softmax over all experts, kept for the `top_k` highest of each token and 0 for the others.

    It sums to less than 1, so that a single expert's weight, too, has a gradient to its scores (Switch Transformers, Fedus
    et al. 2021, arXiv 2101.03961).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    best = p_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values)


def top_p_of_softmax(scores_BTE: Tensor, top_p: float) -> Tensor:
    """w_BTE: softmax over all experts, kept for the fewest that sum to at least `top_p` (above 0, up to 1), else 0.

    Each token has as many experts as that takes, at least one (Huang et al. 2024, arXiv 2403.07652).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    if top_p >= 1:
        return p_BTE
    falling_BTE, order_BTE = p_BTE.detach().sort(dim=-1, descending=True, stable=True)
    # what stands before an expert does not suffice without it
    kept_BTE = functional.pad(falling_BTE.cumsum(dim=-1)[..., :-1], (1, 0)) < top_p
    return p_BTE * torch.zeros_like(kept_BTE).scatter(-1, order_BTE, kept_BTE)


def noisy(scores_BTE: Tensor, spread_BTE: Tensor) -> Tensor:
    """The scores plus normal noise with the standard deviation softplus(spread) (Shazeer et al. 2017, arXiv 1701.06538)."""
    return scores_BTE + torch.randn_like(scores_BTE) * functional.softplus(spread_BTE)


def without_some(scores_BTE: Tensor, share: float, least: int = 1) -> Tensor:
    """The scores with -inf for experts drawn for each token alone, each with probability `share`; `least` always stay."""
    drawn_BTE = torch.rand_like(scores_BTE)
    stays_BTE = (drawn_BTE >= share).scatter(-1, drawn_BTE.topk(least, dim=-1).indices, True)
    return scores_BTE.masked_fill(~stays_BTE, -math.inf)


def within_capacity(
    w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None, *, prioritised: bool = False
) -> Tensor:
    """The weights, but 0 for every token of a row after the first `capacity_B` real ones that an expert got.

    With `prioritised` an expert keeps those that it weighs most, wherever they are (Batch Prioritized Routing, Riquelme et
    al. 2021, arXiv 2106.05974, within a row), the earlier of equal ones. Weights that stay are as they were. A token depends
    on others in its row, so this is for training alone.
    """
    chosen_BTE = w_BTE.detach() != 0
    if real_BT is not None:
        chosen_BTE = chosen_BTE & real_BT[..., None]
    if prioritised:
        falling_BTE = (w_BTE.detach() * chosen_BTE).argsort(dim=1, descending=True, stable=True)
        place_BTE = falling_BTE.argsort(dim=1) + 1
    else:
        place_BTE = chosen_BTE.cumsum(dim=1)
    return w_BTE * (place_BTE <= capacity_B[:, None, None])


def even_share(real_BT: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """capacity_B: `factor` times the tokens that each expert of a row has where all have alike many, rounded up."""
    # in this order a factor of 1 is exact
    return (real_BT.sum(dim=1) * (factor * top_k) / num_experts).ceil()
