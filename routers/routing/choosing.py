"""From scores to weights: a softmax over the few best experts, each token for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.errors import WeightingError
from loraweave.hub.whole_number import is_whole


def top_k_softmax(scores_BTE: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """w_BTE: softmax(score / temperature) over the `top_k` highest scores of each token, 0 for the others; sums to 1.

    A score of -inf takes no part. None is all experts.
    """
    scores_BTE = scores_BTE / temperature if temperature != 1.0 else scores_BTE
    if top_k is None or top_k >= scores_BTE.shape[-1]:
        return scores_BTE.softmax(dim=-1)
    best = scores_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(scores_BTE).scatter_(-1, best.indices, best.values.softmax(dim=-1))


def without(scores_BTE: Tensor, present: Sequence[int], filling: float = -math.inf) -> Tensor:
    """The scores with -inf, or another `filling`, for the experts whose places are not in `present`."""
    if len(present) == scores_BTE.shape[-1]:
        return scores_BTE
    return scores_BTE.masked_fill(_absent(tuple(present), scores_BTE.shape[-1], scores_BTE.device), filling)


# sent to a device once
@lru_cache(maxsize=1024)
def _absent(present: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([place not in present for place in range(num_experts)], device=device)


def straight_through(scores_BTE: Tensor) -> Tensor:
    """w_BTE: exactly 1 for each token's highest score and 0 for the others, with the gradient of softmax(scores)."""
    return best_of(scores_BTE, scores_BTE.softmax(dim=-1))


def best_of(scores_BTE: Tensor, p_BTE: Tensor) -> Tensor:
    """w_BTE: exactly 1 for each token's highest score and 0 for the others, with the gradient of p_BTE."""
    chosen_BTE = functional.one_hot(scores_BTE.argmax(dim=-1), scores_BTE.shape[-1]).to(p_BTE.dtype)
    if not (torch.is_grad_enabled() and p_BTE.requires_grad):
        return chosen_BTE
    # the difference is 0, but for its gradient
    return chosen_BTE + (p_BTE - p_BTE.detach())


def require_top_k(router: str, top_k: int | None, num_experts: int, *, option: str = "top_k") -> None:
    """Raises WeightingError for a top_k, or another option, that is no number of the pool's experts."""
    if top_k is not None and not (is_whole(top_k, 1) and top_k <= num_experts):
        raise WeightingError(
            f"{option} of router {router!r} is {top_k!r}, but the pool has {num_experts} experts; it is a whole number "
            "from 1 to that, or None for the default"
        )


def require_temperature(router: str, temperature: float) -> None:
    """Raises WeightingError for a temperature that is not finite and above 0."""
    # NaN and infinity too
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and 0 < temperature < math.inf):
        raise WeightingError(
            f"temperature of router {router!r} is {temperature!r}; it must be above 0: small values choose one expert, "
            "large ones weigh all alike"
        )
