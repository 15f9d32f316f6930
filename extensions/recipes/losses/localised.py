"""LoRAMoE's balance within halves of the experts, where each row uses the half of its own kind more."""

import torch
from torch import Tensor

from loraweave.extensions.recipes.losses.cv_squared import cv_squared


def localised(use_BE: Tensor, first_B: Tensor, delta: float) -> Tensor:
    """Return `cv_squared` of use_BE * I_BE, where I is 1 - delta in a row's own half and 1 + delta in the other.

    `first_B` is True if a row's own half is the first; `use_BE` has the mean weights of each row's real tokens, as a sum
    would weigh rows by their lengths. 0 if every row uses each expert of its own half (1 + delta) / (1 - delta) times as
    much as each of the other; with `delta` 0, if all experts are used equally. B * E if only one row uses only one expert.

    Dou et al. (2023, arXiv 2312.09979) write 1 + delta for the half that they call a row's own, which so gets *less* where
    the loss is least. Both halves begin alike, so that this changes only which half is whose. Below the variance, their
    formula has the mean, and their code, like this, its square.
    """
    half = use_BE.shape[1] // 2
    own_BE = (torch.arange(use_BE.shape[1], device=use_BE.device) < half) == first_B[:, None]
    return cv_squared(torch.where(own_BE, (1 - delta) * use_BE, (1 + delta) * use_BE))
